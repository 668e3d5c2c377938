"""The surface across a gap is smooth, lies near what is missing, and lets nothing leak in."""

import numpy as np
import pytest

from d3ds2.meshes import gap_fill
from d3ds2.meshes.fill import fill_from_outside
from d3ds2.meshes.flood_fill import pack_bits, unpack_bits
from d3ds2.meshes.gap_closing import enclosed_solid_blocks
from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh
from tests.meshes.test_sdf_to_mesh import assert_closed, band_blocks, grid_points, part_volumes, sphere, to_blocks
from training.mesh_quality import block_plates

R = 128
POINTS = grid_points(R)


def without(blocks, is_removed, number):
    """Leave out the blocks whose centres, in blocks from the centre of the grid, is_removed names: `number` of them."""
    coords, values = blocks
    removed = is_removed(*(coords.T + 0.5 - R / 16))
    assert removed.sum() == number
    return coords[~removed], values[~removed]


def closed(blocks):
    """Close the gaps of blocks: the mesh, which is one closed part without plates, and its volume."""
    mesh = sdf_to_mesh(*blocks, R, close_gaps=True)
    plain = assert_closed(mesh)
    assert len(part_volumes(mesh)) == 1 and block_plates(mesh.vertices, mesh.faces, R) == (0, 0)
    return mesh, plain


BALL_HOLES = {  # blocks left out, their number, voxels that the surface may lie beside the ball
    "2x2": (lambda x, y, z: (x > 0) & (np.maximum(abs(y), abs(z)) < 1), 4, 1.0),
    "4x4": (lambda x, y, z: (x > 0) & (np.maximum(abs(y), abs(z)) < 2), 28, 4.0),
    "cap": (lambda x, y, z: y >= 4.8, 36, 4.0),
}


@pytest.mark.parametrize("hole", BALL_HOLES)
def test_a_ball_is_round_again(hole):
    is_removed, number, beside = BALL_HOLES[hole]
    blocks = without(band_blocks(sphere(R), R), is_removed, number)
    mesh, plain = closed(blocks)
    assert plain.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.015) and plain.euler_number == 2
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.7).max() * R / 2 < beside
    in_gap = ~np.isin(block_ids(plain.triangles_center), block_ids((blocks[0] + 0.5) / (R / 16) - 1))
    angles = np.degrees(plain.face_adjacency_angles)[in_gap[plain.face_adjacency].any(1)]
    assert len(angles) > 500 and angles.max() < 35 and (angles < 15).mean() > 0.99


def block_ids(points):
    return np.floor((points + 1) * (R / 16)).astype(int) @ [10**6, 10**3, 1]


@pytest.mark.parametrize("side", [0.43, 0.46, 0.49, 0.52])  # voxel 3.5, 5.4, 7.4 or 1.3 of a block
def test_a_hole_in_a_flat_side_is_flat_again(side):
    distance = np.maximum.reduce([abs(POINTS[..., 0]) - side, abs(POINTS[..., 1]) - 0.7, abs(POINTS[..., 2]) - 0.7])
    blocks = band_blocks(distance, R)
    number = len(blocks[0])
    blocks = without(blocks, lambda x, y, z: (x > 0) & (np.maximum(abs(y), abs(z)) < 1), 4 if side < 0.47 else 8)
    assert len(blocks[0]) < number
    mesh, plain = closed(blocks)
    assert plain.volume == pytest.approx(2 * side * 1.4**2, rel=0.005)
    over = (np.abs(mesh.vertices[:, 1:]).max(1) < 0.2) & (mesh.vertices[:, 0] > 0)
    assert over.sum() > 500 and np.abs(mesh.vertices[over, 0] - side).max() * R / 2 < 0.5


def test_a_torus_keeps_its_hole():
    distance = np.hypot(np.hypot(POINTS[..., 0], POINTS[..., 1]) - 0.5, POINTS[..., 2]) - 0.22
    blocks = without(band_blocks(distance, R), lambda x, y, z: (x > 5) & (np.maximum(abs(y), abs(z)) < 1), 4)
    _, plain = closed(blocks)
    assert plain.euler_number == 0 and plain.volume == pytest.approx(2 * np.pi**2 * 0.5 * 0.22**2, rel=0.005)


def test_a_cup_stays_open():
    bowl = np.maximum(np.maximum(sphere(R), -sphere(R, 0.4)), POINTS[..., 1] - 0.35)
    blocks = band_blocks(bowl, R)
    _, whole = closed(blocks)
    _, plain = closed(without(blocks, lambda x, y, z: (x > 4) & (np.maximum(abs(y), abs(z)) < 1), 4))
    assert plain.volume == pytest.approx(whole.volume, rel=0.01) and plain.euler_number == 2
    assert plain.contains([[0.55, 0, 0], [0, 0, 0], [0, 0.3, 0]]).tolist() == [True, False, False]


def test_a_sheet_of_one_block_keeps_its_thickness(monkeypatch):
    """Only the rim of the sheet is stored; no block of its middle, six blocks wide, has another one inside near."""
    sheet = np.maximum.reduce([abs(POINTS[..., 0] - 1 / 16) - 1 / 16, *(abs(POINTS[..., i]) - 0.8 for i in (1, 2))])
    coords, values = band_blocks(sheet, R)
    kept = np.abs(coords[:, 1:] - 7.5).max(1) > 3
    middle = np.argwhere(np.ones((1, 6, 6))) + np.array([8, 5, 5])
    monkeypatch.setattr(gap_fill, "enclosed_solid_blocks", lambda *_: middle)
    mesh = sdf_to_mesh(coords[kept], values[kept], R, close_gaps=True)
    assert assert_closed(mesh).euler_number == 2
    over = np.abs(mesh.vertices[:, 1:]).max(1) < 0.3
    heights = (mesh.vertices[over, 0] + 1) * R / 2
    assert heights.min() > 62 and heights.max() < 74  # the faces of the sheet are at 64 and 72
    assert heights[heights > 68].min() > 69.5 and heights[heights < 68].max() < 66.5


def test_missing_blocks_off_the_surface_change_nothing():
    coords, values = band_blocks(sphere(R), R)
    positive = pack_bits(values >= 0)
    gaps = gap_fill.fill_gaps(coords, positive, *faces_of(values), R // 8)
    assert len(gaps.coords) == len(gaps.values) == 0
    for actual, expected in zip(gaps[2:], fill_from_outside(coords, positive, R // 8), strict=True):
        assert np.array_equal(actual, expected)


def test_the_end_of_a_rod_is_round_and_a_short_gap_is_bridged():
    """Blocks that are missing from a rod 14 voxels thick are not judged to be inside; without a fill, it ends flat."""
    rod = np.maximum(np.hypot(POINTS[..., 1] - 0.06, POINTS[..., 2] - 0.06) - 7 / 64, abs(POINTS[..., 0]) - 0.7)
    blocks = band_blocks(rod, R)
    for number, parts in ((1, 1), (5, 2)):  # layers of blocks without the rod
        kept = abs(blocks[0][:, 0] - 8) >= (number + 1) // 2
        flat = sdf_to_mesh(blocks[0][kept], blocks[1][kept], R)
        assert block_plates(flat.vertices, flat.faces, R).count == 2
        mesh = sdf_to_mesh(blocks[0][kept], blocks[1][kept], R, close_gaps=True)
        assert len(part_volumes(mesh)) == parts and block_plates(mesh.vertices, mesh.faces, R).count == 0
        plain = assert_closed(mesh)
        if number == 1:
            assert plain.volume == pytest.approx(assert_closed(sdf_to_mesh(*blocks, R)).volume, rel=0.03)
        else:  # missing from voxel 48 to 88; half balls would end at 55 and 81
            x = (mesh.vertices[:, 0] + 1) * R / 2
            assert 50 < x[x < 68].max() < 55 and 81 < x[x > 68].min() < 86


def faces_of(values):
    def face_sums(axis, layer):
        return values.take(layer, axis + 1).sum((1, 2))

    return face_sums, lambda axis, layer, rows: values[rows].take(layer, axis + 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outer_only", [True, False])
def test_nothing_leaks_in(seed, outer_only):
    rng = np.random.default_rng(seed)
    smooth = np.kron(rng.standard_normal((7, 7, 7)), np.ones((8, 8, 8))) - 0.2 * seed
    coords, values = to_blocks((smooth + 0.5 * rng.standard_normal(smooth.shape)).clip(-1, 1).astype(np.float32))
    kept = rng.random(len(coords)) < 0.6
    coords, values = coords[kept], values[kept]
    positive = pack_bits(values >= 0)
    gaps = gap_fill.fill_gaps(coords, positive, *faces_of(values), 7, outer_only)
    assert len(gaps.coords) > 0 and np.abs(gaps.values).max() <= 1 + 1e-3
    solid = enclosed_solid_blocks(coords, faces_of(values)[0], 7)
    rows, outside, empty = fill_from_outside(coords, positive, 7, outer_only, solid)
    assert not (gaps.outside[: len(coords)] & ~outside).any() and not (gaps.empty & ~empty).any()
    deep = ~empty & (gaps.rows < 0) & (rows < 0)
    assert (unpack_bits(gaps.outside[len(coords) :]).reshape(gaps.values.shape) <= (gaps.values >= 0)).all()
    assert not gaps.empty[deep].any()
    assert_closed(sdf_to_mesh(coords, values, 56, outer_only=outer_only, close_gaps=True))


def surrounded(function, coords):
    """Return near and fixed of blocks whose surroundings are those of a function of the voxel's place (...,3)."""
    table = np.full((9, 9, 9), len(coords))
    table[tuple(coords.T)] = np.arange(len(coords))
    near, fixed = np.empty((3, 2, len(coords)), np.int64), np.zeros((3, 2, len(coords), 8, 8))
    voxels = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1)
    for axis in range(3):
        for end, layer in enumerate((7, 0)):
            beside = coords + (2 * end - 1) * np.eye(3, dtype=int)[axis]
            near[axis, end] = table[tuple(beside.T)]
            values = function(beside[:, None, None] * 8 + voxels.take(layer, axis))
            fixed[axis, end] = np.where((near[axis, end] == len(coords))[:, None, None], values, 0)
    return near, fixed


@pytest.mark.parametrize("steps", [1 << 24, 1])
def test_harmonic_functions_come_back(steps, monkeypatch):
    """These are harmonic on the grid as well. With the fewest steps of the solver, the error is still small."""
    monkeypatch.setattr(gap_fill, "CELL_STEPS", steps)
    coords = np.argwhere(np.random.default_rng(0).random((7, 7, 7)) < 0.7) + 1
    place = coords[:, None, None, None] * 8 + np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1)
    for function in (
        lambda p: (p - 36) @ [0.01, 0.005, -0.012],
        lambda p: ((p[..., 0] - 36) ** 2 - (p[..., 2] - 30) ** 2) / 1000,
    ):
        u = gap_fill._solve(*surrounded(function, coords), np.zeros(len(coords)))
        assert np.abs(u - function(place)).max() < (0.01 if steps > 1 else 0.1)


def test_drawn_blocks_go_to_their_side():
    """Between 0 and 0 on both sides, u = cosh(x / SCREENING) / cosh(w / SCREENING) - 1 in the middle of a sheet."""
    coords = np.argwhere(np.ones((2, 7, 7))) + np.array([3, 1, 1])
    near, fixed = surrounded(lambda p: np.zeros(p.shape[:-1]), coords)
    u = gap_fill._solve(near, fixed, -np.ones(len(coords)))
    middle = np.concatenate([u[(coords == [x, 4, 4]).all(1)][0, :, 4, 4] for x in (3, 4)])
    x = np.arange(16) - 7.5
    expected = np.cosh(x / gap_fill.SCREENING) / np.cosh(8.5 / gap_fill.SCREENING) - 1
    np.testing.assert_allclose(middle, expected, atol=0.01)
