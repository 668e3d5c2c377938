"""Marching cubes on blocks gives one closed outer surface, the same as on a dense grid."""

from pathlib import Path

import numpy as np
import pytest
import skimage.measure
import trimesh
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from d3ds2.meshes.manifold_mesh import separate_sheets
from d3ds2.meshes.marching_cubes_table import ENDS, loops_of_case, marching_cubes_table, share_a_face
from d3ds2.meshes.mesh import Mesh, area_weighted_normals, decimate, drop_parts
from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh
from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh

MESHES = Path(__file__).parents[1] / "data" / "meshes"


def grid_points(R):
    """Return the voxel centres in the cube, (R, R, R, 3)."""
    axis = (np.arange(R) + 0.5) / R * 2 - 1
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def to_blocks(field):
    """Split a volume (R, R, R) into all its blocks: coordinates (B, 3) and values (B, 8, 8, 8)."""
    G = len(field) // 8
    blocks = field.reshape(G, 8, G, 8, G, 8).transpose(0, 2, 4, 1, 3, 5)
    return np.argwhere(np.ones((G, G, G))), blocks.reshape(-1, 8, 8, 8)


def band_blocks(field, R, band=2.0):
    """Truncate a distance (R, R, R) in the cube and return its blocks that have an active voxel."""
    coords, values = to_blocks((field * R / 2 / band).clip(-1, 1))
    active = (np.abs(values) < 1).any((1, 2, 3))
    return coords[active], values[active]


def sphere(R, radius=0.7, centre=(0.0, 0.0, 0.0)):
    return np.linalg.norm(grid_points(R) - centre, axis=-1) - radius


def part_volumes(mesh):
    """Return the signed volume of each connected part."""
    edges = np.concatenate([mesh.faces[:, :2], mesh.faces[:, 1:]])
    V = len(mesh.vertices)
    count, label = connected_components(coo_array((np.ones(len(edges)), edges.T), shape=(V, V)))
    a, b, c = mesh.vertices[mesh.faces].astype(np.float64).transpose(1, 0, 2)
    return np.bincount(label[mesh.faces[:, 0]], (a * np.cross(b, c)).sum(1) / 6, count)


def assert_closed(mesh):
    assert mesh.vertices.dtype == np.float32 and mesh.faces.dtype == np.int64 and mesh.normals.dtype == np.float32
    assert np.abs(mesh.vertices).max() <= 1.0
    assert (np.unique(mesh.faces) == np.arange(len(mesh.vertices))).all()
    plain = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert plain.is_watertight and plain.is_winding_consistent
    loaded = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)  # merges vertices by position, as file formats do
    assert len(loaded.vertices) == len(mesh.vertices) and loaded.is_watertight
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1.0, atol=1e-5)
    return plain


def test_table():
    table, counts = marching_cubes_table()
    assert counts[0] == counts[255] == 0 and counts.max() == 5
    for case in range(256):
        inside = [bool(case >> k & 1) for k in range(8)]
        crossed = {edge for edge, (a, b) in enumerate(ENDS) if inside[a] != inside[b]}
        triangles = table[case, : counts[case]].tolist()
        assert {edge for triangle in triangles for edge in triangle} == crossed
        border = [pair for loop in loops_of_case(case) for pair in zip(loop, loop[1:] + loop[:1], strict=True)]
        sides = [(t[i], t[(i + 1) % 3]) for t in triangles for i in range(3)]
        assert len(set(sides)) == len(sides) and set(border) <= set(sides)
        for side in set(sides) - set(border):  # a diagonal: used once each way, never on a face of the cube
            assert side[::-1] in sides and not share_a_face(*side)


def smooth_fields():
    p = grid_points(32)
    x, y, z = (p * 6).transpose(3, 0, 1, 2)
    yield "sphere", sphere(32)
    yield "torus", np.hypot(np.hypot(p[..., 0], p[..., 1]) - 0.55, p[..., 2]) - 0.25
    yield "gyroid", np.maximum(np.sin(x) * np.cos(y) + np.sin(y) * np.cos(z) + np.sin(z) * np.cos(x), sphere(32, 0.9))


@pytest.mark.parametrize("level", [0.0, 0.05])
@pytest.mark.parametrize(
    ("method", "field"),
    [("lorensen", field) for _, field in smooth_fields()]
    + [("lewiner", field) for name, field in smooth_fields() if name != "gyroid"],
)
def test_same_surface_as_skimage(field, level, method):
    """Lewiner's table differs where a cube can be joined in two ways, as on the gyroid's sharp edges."""
    field = field.astype(np.float32)
    mesh = sdf_to_mesh(*to_blocks(field), 32, level, outer_only=False)
    vertices, faces, *_ = skimage.measure.marching_cubes(field, level, method=method)
    vertices = (vertices + 0.5) / 32 * 2 - 1
    assert len(mesh.vertices) == len(vertices) and len(mesh.faces) == len(faces)
    distance, index = cKDTree(vertices).query(mesh.vertices)
    assert distance.max() < 2e-3 / 16 and len(np.unique(index)) == len(vertices)  # 2e-3 voxels: the margin
    ours, theirs = assert_closed(mesh), trimesh.Trimesh(vertices, faces, process=False)
    assert ours.volume == pytest.approx(abs(theirs.volume), rel=1e-3)
    assert ours.euler_number == theirs.euler_number


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("outer_only", [True, False])
def test_noise_is_closed(share, missing, outer_only):
    rng = np.random.default_rng(int(share * 10))
    coords, values = to_blocks(rng.random((24, 24, 24)) - share)
    kept = rng.random(len(coords)) >= missing
    mesh = sdf_to_mesh(coords[kept], values[kept], 24, outer_only=outer_only)
    assert_closed(mesh)
    assert (part_volumes(mesh) > 0).all() if outer_only else part_volumes(mesh).sum() > 0


@pytest.mark.parametrize("band", [2.0, 4.0])
def test_band_gives_what_the_dense_grid_gives(band):
    field = sphere(64, 0.65, (0.1, 0.05, -0.07)).astype(np.float32)
    coords, values = band_blocks(field, 64, band)
    assert len(coords) < 400
    sparse = sdf_to_mesh(coords, values, 64)
    full = sdf_to_mesh(*to_blocks((field * 32 / band).clip(-1, 1)), 64)
    np.testing.assert_array_equal(sparse.vertices, full.vertices)
    np.testing.assert_array_equal(sparse.faces, full.faces)
    assert assert_closed(sparse).euler_number == 2
    radius = np.linalg.norm(sparse.vertices - (0.1, 0.05, -0.07), axis=1)
    assert np.abs(radius - 0.65).max() < 0.001


def test_normals_are_the_gradient():
    mesh = sdf_to_mesh(*band_blocks(sphere(64), 64), 64)
    direction = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    assert (mesh.normals * direction).sum(1).min() > 0.999
    assert (area_weighted_normals(mesh.vertices, mesh.faces) * direction).sum(1).min() > 0.99


def test_order_of_blocks_and_threads_do_not_matter():
    coords, values = band_blocks(sphere(64), 64)
    order = np.random.default_rng(0).permutation(len(coords))
    one = sdf_to_mesh(coords, values, 64, threads=1)
    other = sdf_to_mesh(coords[order].astype(np.int32), values[order].astype(np.float64), 64, threads=3)
    for name in ("vertices", "faces", "normals"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_values_exactly_at_the_level_are_closed():
    p = np.abs(np.arange(24) - 11)
    field = np.maximum.reduce(np.meshgrid(p, p, p, indexing="ij")) - 5.0  # a box whose sides pass through centres
    mesh = sdf_to_mesh(*to_blocks(field / 20), 24)
    assert assert_closed(mesh).euler_number == 2
    assert_closed(sdf_to_mesh(*to_blocks(np.random.default_rng(0).integers(-1, 2, (24, 24, 24)) / 2.0), 24))


def test_solid_at_the_border_of_the_grid_is_closed_there():
    mesh = sdf_to_mesh(*to_blocks(np.full((16, 16, 16), -1.0)), 16)
    plain = assert_closed(mesh)
    np.testing.assert_allclose(plain.bounds, [[-1, -1, -1], [1, 1, 1]], atol=1e-6)
    assert plain.volume == pytest.approx(8, rel=0.01)
    assert_closed(sdf_to_mesh(*band_blocks(sphere(32, 0.5, (0.9, 0.9, 0.9)), 32), 32))


def test_missing_blocks_take_the_side_of_the_outside():
    coords, values = band_blocks(sphere(64), 64)
    hole = np.flatnonzero((coords == (6, 3, 3)).all(1))  # without this block of the surface, the inside is reached
    assert len(hole) == 1
    mesh = sdf_to_mesh(np.delete(coords, hole, 0), np.delete(values, hole, 0), 64)
    assert assert_closed(mesh).volume < 0.9 * 4 / 3 * np.pi * 0.7**3
    assert len(part_volumes(mesh)) == 1


@pytest.mark.parametrize("removed", [1, 2])
def test_gaps_in_a_surface_can_be_closed(removed):
    coords, values = band_blocks(sphere(64), 64)
    kept = ~((coords[:, 0] == 6) & (coords[:, 1] == 3) & (coords[:, 2] // 4 == 0) & (coords[:, 2] > 3 - removed))
    assert kept.sum() == len(coords) - removed
    mesh = sdf_to_mesh(coords[kept], values[kept], 64, close_gaps=True)
    assert assert_closed(mesh).volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.03)
    assert len(part_volumes(mesh)) == 1


@pytest.mark.parametrize("cut", [0.45, 0.2])
def test_large_holes_are_closed(cut):
    """A ball without its cap has a hole seven or more blocks wide; only lines of sight tell it from a bowl."""
    coords, values = band_blocks(sphere(128), 128)
    kept = (coords[:, 1] + 0.5) / 8 - 1 < cut
    assert kept.sum() < len(coords) - 40
    hollow = sdf_to_mesh(coords[kept], values[kept], 128)
    closed = sdf_to_mesh(coords[kept], values[kept], 128, close_gaps=True)
    height = 0.7 - cut  # of the missing cap
    volume = 4 / 3 * np.pi * 0.7**3 - np.pi * height**2 * (0.7 - height / 3)
    assert assert_closed(hollow).volume < 0.6 * volume
    assert 0.97 * volume < assert_closed(closed).volume < 1.01 * 4 / 3 * np.pi * 0.7**3  # flat, or up to the cap
    assert len(part_volumes(closed)) == 1


def test_bowls_stay_open():
    bowl = np.maximum(np.maximum(sphere(128), -sphere(128, 0.5)), grid_points(128)[..., 1] - 0.35)
    blocks = band_blocks(bowl, 128)
    plain, closed = sdf_to_mesh(*blocks, 128), sdf_to_mesh(*blocks, 128, close_gaps=True)
    assert np.array_equal(plain.vertices, closed.vertices)


def test_closing_gaps_changes_nothing_where_there_are_none():
    x, y, z = grid_points(128).transpose(3, 0, 1, 2)
    box = np.maximum.reduce([abs(x), abs(y), abs(z)]) - 0.7
    slot = np.maximum.reduce([abs(x) - 0.15, 0.1 - y, abs(z) - 2.0])  # open, about two blocks wide
    hollow = np.maximum(sphere(128), -sphere(128, 0.5))
    for field in (np.maximum(box, -slot), hollow, np.minimum(sphere(128, 0.3), sphere(128, 0.3, (0.65, 0, 0)))):
        blocks = band_blocks(field, 128)
        plain, closed = sdf_to_mesh(*blocks, 128), sdf_to_mesh(*blocks, 128, close_gaps=True)
        assert np.array_equal(plain.vertices, closed.vertices) and np.array_equal(plain.faces, closed.faces)


def test_inner_surfaces_are_removed():
    hollow = np.maximum(sphere(64), -sphere(64, 0.4))
    core = np.minimum(hollow, sphere(64, 0.2))  # and a ball in the cavity
    for field in (hollow, core):
        plain = assert_closed(sdf_to_mesh(*band_blocks(field, 64), 64))
        assert plain.euler_number == 2 and plain.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.01)
    cavity = sdf_to_mesh(*band_blocks(hollow, 64), 64, outer_only=False)
    assert_closed(cavity)
    assert sorted(part_volumes(cavity)) == pytest.approx([-4 / 3 * np.pi * 0.4**3, 4 / 3 * np.pi * 0.7**3], rel=0.01)


def test_positive_values_behind_the_band_make_no_inner_shell():
    coords, values = band_blocks(sphere(64), 64)  # the released weights say +1 beyond the band on both sides
    values = np.where(values <= -1.0, 1.0, values)
    assert (np.abs(values) == 1).any()
    plain = assert_closed(sdf_to_mesh(coords, values, 64))
    assert plain.euler_number == 2 and plain.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.01)


def three_balls():
    balls = sphere(64, 0.5, (-0.3, 0, 0)), sphere(64, 0.2, (0.6, 0, 0)), sphere(64, 0.05, (0.6, 0.6, 0))
    return band_blocks(np.minimum.reduce(balls), 64)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, 3),
        ({"min_component": 0.05}, 2),
        ({"min_component": 100}, 2),
        ({"min_component": 0.5}, 1),
        ({"keep_largest": True}, 1),
    ],
)
def test_small_parts_are_dropped(options, parts):
    mesh = sdf_to_mesh(*three_balls(), 64, **options)
    assert_closed(mesh)
    volumes = part_volumes(mesh)
    assert len(volumes) == parts and volumes.max() == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02)


def test_dropping_all_parts_is_an_error():
    mesh = sdf_to_mesh(*three_balls(), 64)
    with pytest.raises(ValueError, match="at most the largest part"):
        drop_parts(mesh, min_component=10**9)


def translated(mesh, *offset):
    mesh = mesh.copy()
    mesh.apply_translation(offset)
    return mesh


def primitives():
    creation = trimesh.creation
    yield "box", creation.box((1, 0.7, 0.4)), True
    yield "thin-plate", creation.box((1, 1, 0.001)), False
    yield "needle", creation.cylinder(0.004, 1.0), False
    yield "capsule", creation.capsule(0.6, 0.3), True
    yield "torus", creation.torus(0.5, 0.15), True
    yield "cone", creation.cone(0.4, 1.0), True
    yield "tube", creation.annulus(0.3, 0.5, 0.8), True
    yield "open-tube", creation.cylinder(0.4, 1.0, cap=False), False
    ball = creation.icosphere(3)
    yield "half-sphere", ball.submesh([np.flatnonzero(ball.triangles_center[:, 2] > 0)], append=True), False
    yield "crossing-boxes", creation.box((1, 0.3, 0.3)) + creation.box((0.3, 1, 0.3)), False
    yield "box-in-box", creation.box((1, 1, 1)) + creation.box((0.5, 0.5, 0.5)), False
    yield "two-parts", creation.icosphere(3) + translated(creation.box((1, 1, 1)), 2, 0, 0), True


def shapes():
    for name, mesh, is_solid in primitives():
        yield pytest.param(mesh.vertices, mesh.faces, abs(mesh.volume) if is_solid else None, id=name)
    for path in sorted(MESHES.glob("*.npz")):
        with np.load(path) as file:
            yield pytest.param(file["v"] / 65535 - 0.5, file["f"].astype(np.int64), None, id=path.stem)


def test_meshes_of_the_corpus_are_here():
    assert len(list(MESHES.glob("*.npz"))) == 6


@pytest.mark.parametrize("resolution", [64, 128])
@pytest.mark.parametrize(("vertices", "faces", "volume"), list(shapes()))
def test_any_mesh_comes_back_closed(vertices, faces, volume, resolution):
    scaled = normalize_mesh(vertices, 0.9)
    sdf = mesh_to_sdf(scaled, faces, resolution)
    mesh = sdf_to_mesh(sdf.block_coords, sdf.values, resolution)
    plain = assert_closed(mesh)
    assert (part_volumes(mesh) > 0).all()
    shell = 0.55 * 2 / resolution  # the surface lies this far outside the triangles
    np.testing.assert_allclose(plain.bounds, [scaled.min(0) - shell, scaled.max(0) + shell], atol=2 / resolution)
    if volume is not None:
        scale = 0.9 * 2 / np.ptp(vertices, 0).max()
        solid = trimesh.Trimesh(scaled, faces)
        assert volume * scale**3 < plain.volume < volume * scale**3 + 1.15 * shell * solid.area


@pytest.mark.parametrize("target", [20_000, 8000, 2000, 500])
@pytest.mark.parametrize("name", ["sphere", "kenney_foodkit_v1_2_fries", "thebasemesh_pallet_box_01"])
def test_decimated_mesh_stays_closed(name, target):
    if name == "sphere":
        mesh = sdf_to_mesh(*band_blocks(sphere(128, 0.8), 128), 128)
    else:
        with np.load(MESHES / f"{name}.npz") as file:
            sdf = mesh_to_sdf(normalize_mesh(file["v"] / 65535 - 0.5), file["f"], 128)
        mesh = sdf_to_mesh(sdf.block_coords, sdf.values, 128)
    small = decimate(mesh, target)
    plain = assert_closed(small)
    assert 0.9 * target < len(small.faces) < len(mesh.faces)
    if target >= 8000 or name == "sphere":
        assert len(small.faces) < 1.1 * target
    volume = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume
    assert plain.volume == pytest.approx(volume, rel=0.03 if target >= 8000 else 0.05)
    assert decimate(small, len(small.faces)) is small


def touching(case):
    """Return vertices and faces of a closed, oriented mesh whose sheets meet, and its number of separate parts."""
    ball = trimesh.creation.icosphere(1)
    if case in ("edge", "vertex"):  # two boxes that share one
        box = trimesh.creation.box((1, 1, 1))
        both = trimesh.util.concatenate(box, translated(box, 1, 1, 0 if case == "edge" else 1))
        both.merge_vertices()
        return both.vertices, both.faces, 2
    if case == "back-to-back":  # a flat pocket on three vertices of a ball
        pocket = [ball.faces[0], ball.faces[0][::-1]]
        return ball.vertices, np.concatenate([ball.faces, pocket]), 1
    # a box with two tetrahedral cavities that share an edge: they stay one cavity, with that edge doubled
    vertices = np.array([[0, 0, 1], [0, 0, -1], [1, 0.3, 0], [1, -0.3, 0], [-1, 0.3, 0], [-1, -0.3, 0]])
    first = np.array([[0, 1, 2], [1, 0, 3], [0, 2, 3], [2, 1, 3]])
    second = np.array([[0, 1, 5], [1, 0, 4], [0, 5, 4], [5, 1, 4]])
    outer = trimesh.creation.box((3, 3, 3))
    assert trimesh.Trimesh(vertices, first).volume < 0 and trimesh.Trimesh(vertices, second).volume < 0
    return np.concatenate([vertices, outer.vertices]), np.concatenate([first, second, outer.faces + 6]), 2


@pytest.mark.parametrize("case", ["edge", "vertex", "back-to-back", "cavities"])
def test_touching_sheets_are_separated(case):
    vertices, faces, parts = touching(case)
    volume = trimesh.Trimesh(vertices, faces, process=False).volume
    vertices, faces = separate_sheets(vertices, faces)
    mesh = Mesh(vertices / 4, faces, area_weighted_normals(vertices, faces))
    plain = assert_closed(mesh)
    assert len(part_volumes(mesh)) == parts
    assert (part_volumes(mesh) > 0).sum() == (1 if case == "cavities" else parts)
    assert plain.volume * 64 == pytest.approx(volume, rel=0.01)


def test_decimate_errors(monkeypatch):
    mesh = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]] * 5), np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="at least 4, got 3"):
        decimate(mesh, 3)
    monkeypatch.setitem(__import__("sys").modules, "fast_simplification", None)
    with pytest.raises(ImportError, match="pip install fast-simplification"):
        decimate(mesh, 4)


COORDS, VALUES = to_blocks(sphere(16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COORDS, VALUES, 20), "multiple of 8 up to 2048, got 20"),
        ((COORDS[:, :2], VALUES, 16), r"block_coords \(B, 3\)"),
        ((COORDS[:0], VALUES[:0], 16), "B > 0"),
        ((COORDS[:5], VALUES, 16), r"values \(5, 8, 8, 8\), got \(8, 8, 8, 8\)"),
        ((COORDS + 1, VALUES, 16), r"in \[0, 2\), got 1 to 2"),
        ((COORDS * 0, VALUES, 16), "each block once"),
        ((COORDS, np.where(VALUES > 0.5, np.nan, VALUES), 16), "finite values"),
        ((COORDS, np.where(VALUES > 0.5, np.inf, VALUES), 16), "finite values"),
        ((COORDS, np.abs(VALUES) + 0.1, 16), "both sides of 0.0"),
        ((COORDS, VALUES, 16, 1.0), r"level in \(-1, 1\)"),
        ((COORDS, VALUES, 16, 0.0, True, -1.0), "min_component >= 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sdf_to_mesh(*arguments)
