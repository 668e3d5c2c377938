"""A mesh of any quality becomes the signed distance of a closed solid."""

import importlib

import numpy as np
import pytest
import trimesh

from d3ds2.meshes.flood_fill import flood_fill, pack_bits, unpack_bits
from d3ds2.meshes.mesh_to_sdf import default_band, mesh_to_sdf, normalize_mesh
from d3ds2.meshes.numba_kernel import for_ranges
from d3ds2.meshes.triangle_distance import blocks_near_triangles, measure_blocks, triangle_distance_reference

SHELL = 0.55


def dense(sdf):
    """Return the values on the whole grid, (R, R, R), with nan where there is no block."""
    grid = np.full((sdf.resolution,) * 3, np.nan, np.float32)
    for (x, y, z), block in zip(sdf.block_coords * 8, sdf.values, strict=True):
        grid[x : x + 8, y : y + 8, z : z + 8] = block
    return grid


def centres(sdf):
    """Return the positions (N, 3) of the active voxels in the cube."""
    return (sdf.coords + 0.5) / sdf.resolution * 2 - 1


def box(extents, centre=(0.0, 0.0, 0.0)):
    return trimesh.creation.box(extents, transform=trimesh.transformations.translation_matrix(centre))


def merged(*meshes):
    mesh = trimesh.util.concatenate(meshes)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def sphere_distance(p):
    return np.linalg.norm(p, axis=1) - 0.7


def box_distance(p, half=(0.7, 0.5, 0.3)):
    q = np.abs(p) - half
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)


def cylinder_distance(p):
    q = np.stack([np.hypot(p[:, 0], p[:, 1]) - 0.5, np.abs(p[:, 2]) - 0.6], 1)
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)


def torus_distance(p):
    return np.hypot(np.hypot(p[:, 0], p[:, 1]) - 0.6, p[:, 2]) - 0.2


@pytest.mark.parametrize(
    ("mesh", "distance"),
    [
        pytest.param(trimesh.creation.icosphere(5, 0.7), sphere_distance, id="sphere"),
        pytest.param(box((1.4, 1.0, 0.6)), box_distance, id="box"),
        pytest.param(trimesh.creation.cylinder(0.5, 1.2, sections=256), cylinder_distance, id="cylinder"),
        pytest.param(trimesh.creation.torus(0.6, 0.2, 256, 128), torus_distance, id="torus"),
    ],
)
def test_closed_solid_gets_its_distance_minus_the_shell(mesh, distance):
    sdf = mesh_to_sdf(mesh.vertices, mesh.faces, 128, band=3.0)
    error = np.abs(sdf.sdf * sdf.band - (distance(centres(sdf)) * 64 - SHELL))  # voxels
    assert error.mean() < 0.01  # the facets of the sphere
    assert (error > 0.1).mean() < 0.002  # at corners of the shell two sides are equally near
    assert error.max() < 2 * SHELL
    p = (np.argwhere(np.isfinite(dense(sdf))) + 0.5) / 64 - 1
    known = dense(sdf)[np.isfinite(dense(sdf))]
    expected = distance(p) * 64 - SHELL
    assert (known[expected > 3.05] == 1.0).all() and (known[expected < -3.05] == -1.0).all()
    missed = np.argwhere(np.isnan(dense(sdf)))
    assert (np.abs(distance((missed + 0.5) / 64 - 1) * 64 - SHELL) > 2.9).all()


def soup(seed):
    """Make triangles (F, 3, 3) of all kinds in a grid of 32³ voxels: small, large, slivers, segments, points."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(2, 29, (40, 1, 3))
    triangles = centre + rng.normal(size=(40, 3, 3)) * rng.choice([0.05, 1.0, 6.0], (40, 1, 1))
    triangles[:6, 2] = triangles[:6, 0] * 0.3 + triangles[:6, 1] * 0.7  # three points on a line
    triangles[6:9, 1] = triangles[6:9, 0]
    triangles[9:11] = triangles[9:11, :1]
    triangles[11:16, 2] = triangles[11:16, 0] + 1e-5 * rng.normal(size=(5, 3))
    return triangles.clip(-0.5, 31.5)


def test_definition_agrees_with_trimesh():
    triangles = soup(0)[16:]
    points = np.random.default_rng(1).uniform(0, 31, (200, 3))
    pairs = np.repeat(points, len(triangles), 0)
    nearest = trimesh.triangles.closest_point(np.tile(triangles, (len(points), 1, 1)), pairs)
    expected = np.linalg.norm(nearest - pairs, axis=1).reshape(len(points), -1).min(1)
    np.testing.assert_allclose(triangle_distance_reference(points, triangles), expected, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("radius", [0.55, 2.55, 4.5])
def test_distance_matches_definition(seed, radius):
    triangles = soup(seed)
    blocks, offsets, pairs = blocks_near_triangles(triangles, radius, 4)
    distance = np.full((len(blocks), 512), np.nan, np.float32)
    for_ranges(measure_blocks, len(blocks), 2, triangles, radius, 4, blocks, offsets, pairs, distance)
    actual = np.full((64, 512), np.inf)
    actual[blocks] = distance
    actual = actual.reshape(4, 4, 4, 8, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(-1)
    expected = triangle_distance_reference(np.argwhere(np.ones((32,) * 3)), triangles)
    measured = np.isfinite(actual)
    np.testing.assert_allclose(actual[measured], expected[measured], atol=2e-5)
    assert measured[expected < radius - 1e-4].all() and not measured[expected > radius + 1e-4].any()


def test_flood_fill_matches_labels():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    free = rng.random((32,) * 3) < 0.36  # near the percolation threshold: long, winding ways
    stored = rng.random((4,) * 3) < 0.7
    free |= ~stored.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    blocks = free.reshape(4, 8, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(64, 512)[stored.ravel()]
    rows = np.full(64, -1, np.int32)
    rows[stored.ravel()] = np.arange(len(blocks))
    words, empty = pack_bits(blocks), np.zeros(64, bool)
    assert (unpack_bits(words) == blocks).all()
    reached = np.zeros_like(words)
    flood_fill(4, rows, words, reached, empty)
    labels = ndimage.label(free)[0]
    at_border = np.ones((32,) * 3, bool)
    at_border[1:-1, 1:-1, 1:-1] = False
    expected = np.isin(labels, np.setdiff1d(labels[at_border], 0))
    assert 0 < expected.sum() < free.sum()
    actual = np.repeat(empty[:, None], 512, 1)
    actual[stored.ravel()] = unpack_bits(reached)
    actual = actual.reshape(4, 4, 4, 8, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(32, 32, 32)
    assert (actual == expected).all()


def test_open_sheet_becomes_a_slab():
    z = 0.1234
    vertices = np.array([[-0.6, -0.6, z], [0.6, -0.6, z], [0.6, 0.6, z], [-0.6, 0.6, z]])
    sdf = mesh_to_sdf(vertices, np.array([[0, 1, 2], [0, 2, 3]]), 64)
    p = centres(sdf)
    expected = box_distance(p - (0, 0, z), (0.6, 0.6, 0.0)) * 32 - SHELL
    np.testing.assert_allclose(sdf.sdf * sdf.band, expected, atol=1e-5)
    assert (sdf.sdf < 0).any()


def test_open_box_is_hollow_and_a_wider_shell_closes_a_gap():
    mesh = box((1.0, 1.0, 1.0))
    lid = mesh.face_normals[:, 2] > 0.5
    hollow = dense(mesh_to_sdf(mesh.vertices, mesh.faces[~lid], 64))
    assert np.isnan(hollow[32, 32, 32]) and hollow[32, 32, 19] > 0.9  # free air right above the floor
    cover = box((1.0, 1.0, 0.5), (0, 0, 0.28))
    floor = box((1.0, 1.0, 0.5), (0, 0, -0.28))
    vertices, faces = merged(
        cover.submesh([np.flatnonzero(cover.face_normals[:, 2] > -0.5)], append=True),
        floor.submesh([np.flatnonzero(floor.face_normals[:, 2] < 0.5)], append=True),
    )  # a box cut in two around its middle, 1.92 voxels apart
    assert np.isnan(dense(mesh_to_sdf(vertices, faces, 64))[32, 32, 32])
    assert dense(mesh_to_sdf(vertices, faces, 64))[32, 18, 32] > 0.9
    assert dense(mesh_to_sdf(vertices, faces, 64, shell=1.0))[32, 18, 32] < 0.0


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(trimesh.creation.icosphere(2, 0.3), id="shell"),
        pytest.param(box((0.9, 0.9, 1e-9)), id="wall"),
        pytest.param(merged(trimesh.creation.icosphere(2, 0.4), trimesh.creation.icosphere(2, 0.2)), id="two-shells"),
        pytest.param(box((0.8, 0.6, 0.6), (0.1, 0, 0)), id="box-in-box"),
    ],
)
def test_faces_inside_the_solid_make_no_surface(inner):
    outer = box((1.2, 1.2, 1.2))
    inner = trimesh.Trimesh(*inner) if isinstance(inner, tuple) else inner
    alone = dense(mesh_to_sdf(outer.vertices, outer.faces, 64))
    both = dense(mesh_to_sdf(*merged(outer, inner), 64))
    assert (np.nan_to_num(both, nan=-1.0)[13:51, 13:51, 13:51] < 0).all()
    positive = np.nan_to_num(alone) > 0
    assert positive.sum() > 10_000
    np.testing.assert_array_equal(both[positive], alone[positive])


def test_self_intersection_is_a_union():
    one, other = box((1.2, 0.5, 0.5)), box((0.5, 1.2, 0.5), (0.05, 0.03, 0.01))
    sdf = mesh_to_sdf(*merged(one, other), 64)
    p = centres(sdf)
    union = np.minimum(box_distance(p, (0.6, 0.25, 0.25)), box_distance(p - (0.05, 0.03, 0.01), (0.25, 0.6, 0.25))) * 32
    outside = union > SHELL
    np.testing.assert_allclose((sdf.sdf * sdf.band)[outside], union[outside] - SHELL, atol=1e-4)
    assert (sdf.sdf[union < 0] < 0).all()


def test_non_manifold_and_repeated_faces_change_nothing():
    mesh = box((1.0, 0.8, 0.6))
    clean = mesh_to_sdf(mesh.vertices, mesh.faces, 64)
    faces = np.concatenate([mesh.faces, mesh.faces[:5], mesh.faces[3:7, ::-1]])
    dirty = mesh_to_sdf(mesh.vertices, faces, 64)
    np.testing.assert_array_equal(clean.values, dirty.values)
    np.testing.assert_array_equal(clean.sharp, dirty.sharp)


def test_degenerate_triangles_change_nothing():
    mesh = box((1.0, 0.8, 0.6))
    clean = mesh_to_sdf(mesh.vertices, mesh.faces, 64)
    vertices = np.concatenate([mesh.vertices, mesh.vertices[mesh.faces[0, :2]].mean(0, keepdims=True)])
    a, b, c = mesh.faces[0]
    faces = np.concatenate([mesh.faces, [[a, a, b], [c, c, c], [a, len(vertices) - 1, b]]])
    dirty = mesh_to_sdf(vertices, faces, 64)
    np.testing.assert_allclose(clean.values, dirty.values, atol=1e-5)


def test_winding_does_not_matter():
    mesh = trimesh.creation.torus(0.5, 0.2, 24, 16)
    flipped = mesh.faces.copy()
    turned = np.random.default_rng(0).random(len(flipped)) < 0.5
    flipped[turned] = flipped[turned][:, [1, 0, 2]]
    one, other = (mesh_to_sdf(mesh.vertices, faces, 64) for faces in (mesh.faces, flipped))
    np.testing.assert_allclose(one.values, other.values, atol=1e-5)
    np.testing.assert_array_equal(one.sharp, other.sharp)


def test_parts_touching_the_border_stay_solid():
    plate = box((0.02, 2.0, 2.0), (0.99, 0, 0))  # 0.64 voxels thin, in the outermost layer
    sdf = mesh_to_sdf(*merged(plate, box((2.0, 0.4, 0.4))), 64)
    values = dense(sdf)
    assert (values[63] < 0).all() and (values[0, 28:36, 28:36] < 0).all()
    assert values[61, 8, 8] > 0
    assert sdf.coords.max() == 63 and sdf.coords.min() == 0


def test_blocks_are_exactly_those_with_an_active_voxel():
    mesh = trimesh.creation.icosphere(3, 0.8)
    sdf = mesh_to_sdf(mesh.vertices, mesh.faces, 128)
    assert (sdf.block_coords.dtype, sdf.values.dtype, sdf.sharp.dtype) == (np.int32, np.float32, bool)
    assert (np.abs(sdf.values) < 1).any((1, 2, 3)).all()
    ids = sdf.block_coords @ np.array([256, 16, 1])
    assert (np.diff(ids) > 0).all()
    assert sdf.coords.dtype == np.int32 and len(sdf.coords) == len(sdf.sdf) == sdf.active.sum()
    values = dense(sdf)
    np.testing.assert_array_equal(values[tuple(sdf.coords.T)], sdf.sdf)
    block, place = sdf.coords // 8 @ np.array([256, 16, 1]), sdf.coords % 8 @ np.array([64, 8, 1])
    assert (np.diff(block * 512 + place) > 0).all()
    radius = np.linalg.norm((np.argwhere(np.isfinite(values)) + 0.5) / 64 - 1, axis=1)
    beyond = values[np.isfinite(values)]
    assert (beyond[radius > 0.9] == 1.0).all() and (beyond[radius < 0.7] == -1.0).all()


def test_result_does_not_depend_on_threads():
    mesh = trimesh.creation.torus(0.6, 0.25, 40, 20)
    one, *others = (mesh_to_sdf(mesh.vertices, mesh.faces, 128, threads=threads) for threads in (1, 2, 3, None))
    for other in others:
        np.testing.assert_array_equal(one.block_coords, other.block_coords)
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.sharp, other.sharp)


def edge_distance(p, tails, heads):
    """Return the distance, in voxels of 64³, from points in the cube to the nearest of some segments."""
    return triangle_distance_reference(p * 32, np.stack([tails, heads, heads], 1) * 32)


@pytest.mark.parametrize("weld", [True, False])
def test_sharp_voxels_of_a_box_lie_at_its_edges(weld):
    mesh = box((1.2, 0.9, 0.7))
    vertices, faces = (mesh.vertices, mesh.faces)
    if not weld:
        vertices, faces = vertices[faces].reshape(-1, 3), np.arange(36).reshape(12, 3)
    sdf = mesh_to_sdf(vertices, faces, 64)
    corners = mesh.vertices[mesh.edges_unique]
    real = np.ptp(corners, 1).astype(bool).sum(1) == 1  # without the diagonals of the sides
    assert real.sum() == 12
    distance = edge_distance(centres(sdf), corners[real, 0], corners[real, 1])
    marked = sdf.sharp[sdf.active]
    assert marked[distance < 2 - 1e-4].all() and not marked[distance > 2 + 1e-4].any()
    assert not sdf.sharp[~sdf.active].any()


def test_sharp_angle_open_and_non_manifold_edges():
    sphere = trimesh.creation.icosphere(3, 0.7)
    assert not mesh_to_sdf(sphere.vertices, sphere.faces, 64).sharp.any()
    assert mesh_to_sdf(sphere.vertices, sphere.faces, 64, sharp_angle=2.0).sharp.any()
    vertices = np.array([[0, 0, 0], [0, 0, 0.5], [0.5, 0, 0], [-0.5, 0.05, 0], [-0.4, 0.06, 0.0]])
    folded = mesh_to_sdf(vertices, np.array([[0, 1, 2], [1, 0, 3]]), 64)  # 6 degrees: only the border is sharp
    middle = np.linalg.norm(centres(folded) - (0, 0, 0.25), axis=1) < 0.03
    assert middle.any() and not folded.sharp[folded.active][middle].any()
    border = edge_distance(centres(folded), vertices[[0, 1, 0, 1]], vertices[[2, 2, 3, 3]]) < 1.9
    assert folded.sharp[folded.active][border].all()
    fan = mesh_to_sdf(vertices, np.array([[0, 1, 2], [1, 0, 3], [0, 1, 4]]), 64)  # a third face at the same edge
    middle = np.linalg.norm(centres(fan) - (0, 0, 0.25), axis=1) < 0.03
    assert fan.sharp[fan.active][middle].all()


def test_band_defaults():
    assert [default_band(R) for R in (64, 128, 256, 320, 384, 512, 768, 1024)] == [2, 2, 2, 2, 3, 4, 4, 4]
    mesh = trimesh.creation.icosphere(2, 0.7)
    assert mesh_to_sdf(mesh.vertices, mesh.faces, 384).band == 3


def test_normalize_mesh():
    vertices = normalize_mesh(np.array([[1.0, 2.0, 3.0], [5.0, 3.0, 3.5]]))
    assert vertices.dtype == np.float32
    np.testing.assert_allclose(vertices, [[-0.95, -0.2375, -0.11875], [0.95, 0.2375, 0.11875]])
    assert np.abs(normalize_mesh(vertices, 1.0)).max() == 1.0


VERTICES = np.array([[0.0, 0, 0], [0.5, 0, 0], [0, 0.5, 0]])
FACES = np.array([[0, 1, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.empty((0, 3)), FACES), r"vertices \(V, 3\) with V > 0"),
        ((VERTICES, np.empty((0, 3), int)), r"faces \(F, 3\) with F > 0"),
        ((VERTICES[:, :2], FACES), r"vertices \(V, 3\)"),
        ((VERTICES, FACES.astype(float)), "integer faces"),
        ((VERTICES, np.array([[0, 1, 2, 0]])), r"faces \(F, 3\)"),
        ((VERTICES * np.nan, FACES), "finite vertices, got 3"),
        ((VERTICES * 3, FACES), r"\[-1, 1\], got coordinates up to 1.5"),
        ((VERTICES, FACES + 1), r"indices in \[0, 3\), got 1 to 3"),
        ((VERTICES, FACES - 1), r"got -1 to 1"),
        ((VERTICES, FACES, 100), "multiple of 8 up to 2048, got 100"),
        ((VERTICES, FACES, 0), "multiple of 8"),
        ((VERTICES, FACES, 64, 1.0), "band of at least"),
        ((VERTICES, FACES, 64, float("nan")), "band of at least"),
        ((VERTICES, FACES, 64, 2.0, 0.3), "shell of at least 0.5"),
        ((VERTICES, FACES, 64, 2.0, 0.55, 30.0, 0), "at least 1 thread"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        mesh_to_sdf(*arguments)


def test_normalize_errors():
    with pytest.raises(ValueError, match="one point"):
        normalize_mesh(np.ones((4, 3)))
    with pytest.raises(ValueError, match="finite"):
        normalize_mesh(np.full((4, 3), np.inf))


def test_kernels_call_only_kernels_of_their_own_file():
    dispatcher, checked = type(measure_blocks), 0
    for name in ("flood_fill", "marching_cubes", "mesh_to_sdf", "sdf_to_mesh", "sharp_edges", "triangle_distance"):
        module = importlib.import_module(f"d3ds2.meshes.{name}")
        own = {v for v in vars(module).values() if isinstance(v, dispatcher) and v.__module__ == module.__name__}
        for function in own:
            used = [vars(module).get(word) for word in function.py_func.__code__.co_names]
            assert all(v in own for v in used if isinstance(v, dispatcher)), function
            checked += 1
    assert checked > 20
