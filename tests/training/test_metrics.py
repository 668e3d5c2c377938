"""Metrics on shapes whose distances, volumes and shells are known."""

import math

import numpy as np
import pytest
import trimesh

from d3ds2.meshes.triangle_distance import triangle_distance_reference
from training.evaluation.metrics import Surface, SurfaceDistances, count_shells, is_watertight, solid_grid, volume_iou


def sphere(radius, center=(0, 0, 0), subdivisions=4):
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    return np.array(mesh.vertices) + center, np.array(mesh.faces)


def box(extents, center=(0, 0, 0)):
    mesh = trimesh.creation.box(extents)
    return np.array(mesh.vertices) + center, np.array(mesh.faces)


def joined(*meshes):
    offsets = np.cumsum([0] + [len(vertices) for vertices, _ in meshes])
    faces = [faces + offset for (_, faces), offset in zip(meshes, offsets, strict=False)]
    return np.concatenate([vertices for vertices, _ in meshes]), np.concatenate(faces)


def inside_out(mesh):
    return mesh[0], mesh[1][:, ::-1]


def between(a, b, num_points=4000):
    return SurfaceDistances.between(Surface(*a, num_points, seed=0), Surface(*b, num_points, seed=1))


def test_identical_surfaces_are_at_distance_zero_with_few_samples():
    coarse, fine = box((1, 1, 1)), trimesh.creation.box((1, 1, 1)).subdivide_to_size(0.05)
    distances = between(coarse, (np.array(fine.vertices), np.array(fine.faces)), 500)
    assert distances.chamfer < 1e-12
    assert distances.f_score(1e-9) == (1, 1, 1)


def test_concentric_spheres():
    distances = between(sphere(0.5), sphere(0.6))
    assert distances.chamfer == pytest.approx(0.1, abs=0.002)
    assert distances.f_score(0.097).f1 == 0 and distances.f_score(0.103) == (1, 1, 1)
    a, b = (solid_grid(*sphere(r), 64) for r in (0.5, 0.6))
    assert volume_iou(a, b) == pytest.approx((0.5 / 0.6) ** 3, abs=0.01)
    assert a.mean() * 8 == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.01)


def test_chamfer_counts_both_directions():
    both, one = joined(sphere(0.1, (-0.5, 0, 0)), sphere(0.1, (0.5, 0, 0))), sphere(0.1, (0.5, 0, 0))
    distances = between(one, both)
    assert distances.to_truth.max() < 1e-12
    assert distances.f_score(0.01)[:2] == (1, pytest.approx(0.5, abs=0.03))  # precise, but half of it is missing
    assert distances.f_score(0.01).f1 == pytest.approx(2 / 3, abs=0.03)
    # points of the missing sphere are at 1 ± 0.1 from the other's centre: E|p - c| = d + r²/(3d), less the radius
    assert distances.chamfer == pytest.approx((1 + 0.01 / 3 - 0.1) / 4, abs=0.01)


def test_samples_are_even_over_the_area():
    surface = Surface(*box((1.0, 0.5, 0.25)), 40000)
    on_top = np.isclose(np.abs(surface.points[:, 2]), 0.125)
    assert on_top.mean() == pytest.approx(2 * 0.5 / (2 * (0.5 + 0.25 + 0.125)), abs=0.01)
    assert np.abs(surface.points[on_top].mean(axis=0)).max() < 0.01
    assert Surface(*sphere(0.3), 5, seed=3).points == pytest.approx(Surface(*sphere(0.3), 5, seed=3).points)


def test_distance_to_triangles_of_all_sizes_is_exact():
    rng = np.random.default_rng(0)
    small = trimesh.creation.icosphere(3, 0.2)
    slivers = rng.uniform(-1, 1, (20, 1, 3)) + rng.normal(0, 1, (20, 3, 3)) * [[[0.3, 0.001, 0.3]]]
    triangles = slivers.reshape(-1, 3), np.arange(60).reshape(20, 3)
    vertices, faces = joined((np.array(small.vertices), np.array(small.faces)), triangles)
    points = np.concatenate([rng.uniform(-1, 1, (100, 3)), Surface(vertices, faces, 200).points + 0.005])
    measured = Surface(vertices, faces, 10).distance(points)
    np.testing.assert_allclose(measured, triangle_distance_reference(points, vertices[faces]), atol=1e-3)


def test_surface_without_area_is_refused():
    with pytest.raises(ValueError, match="no area"):
        Surface(np.zeros((3, 3)), np.array([[0, 1, 2]]))


def test_box_fills_exactly_its_cells_also_where_columns_lie_on_edges():
    grid = solid_grid(*box((1, 1, 1)), 8)  # sides at ±0.5, centres at ±0.125, ±0.375, ...; diagonals through centres
    expected = np.zeros((8, 8, 8), dtype=bool)
    expected[2:6, 2:6, 2:6] = True
    np.testing.assert_array_equal(grid, expected)
    on_centers = solid_grid(*box((0.75, 0.75, 0.75), center=(0.001, 0.001, 0.001)), 8)
    assert on_centers.sum() == 27
    off_axis = solid_grid(*box((0.2, 0.3, 0.4), center=(0.5, -0.3, 0.1)), 64)
    center = (np.argwhere(off_axis).mean(axis=0) + 0.5) / 64 * 2 - 1
    assert center == pytest.approx((0.5, -0.3, 0.1), abs=0.02)  # x, y, z in this order


def test_solid_with_a_cavity_and_overlapping_parts():
    hollow = solid_grid(*joined(sphere(0.8), inside_out(sphere(0.5))), 64)
    assert hollow.mean() * 8 == pytest.approx(4 / 3 * math.pi * (0.8**3 - 0.5**3), rel=0.01)
    assert not hollow[32, 32, 32] and hollow[32, 32, 32 + 21]
    overlap = solid_grid(*joined(box((1, 0.5, 0.5)), box((0.5, 1, 0.5))), 32)
    assert overlap.sum() == 16 * 8 * 8 + 8 * 16 * 8 - 8 * 8 * 8


def test_beyond_the_cube_is_cut_off():
    assert solid_grid(*box((4, 4, 4)), 16).all()
    assert not solid_grid(*box((1, 1, 1), center=(3, 0, 0)), 16).any()


def test_iou_of_grids():
    a, b = np.zeros((2, 4, 4, 4), dtype=bool)
    assert volume_iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert volume_iou(a, b) == pytest.approx(1 / 3)


def test_watertight():
    _, faces = sphere(1)
    assert is_watertight(faces)
    assert not is_watertight(faces[1:])  # a hole
    flipped = faces.copy()
    flipped[0] = flipped[0, ::-1]
    assert not is_watertight(flipped)  # one face turned round
    assert not is_watertight(np.concatenate([faces, faces]))  # four faces on every edge
    assert is_watertight(joined(sphere(1), sphere(2))[1])
    assert not is_watertight(np.zeros((0, 3), dtype=np.int64))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([sphere(0.5)], (1, 0)),
        ([sphere(0.2, (-0.5, 0, 0)), sphere(0.2, (0.5, 0, 0)), box((0.1, 0.1, 0.1), (0, 0, 0.6))], (3, 0)),
        ([sphere(0.8), inside_out(sphere(0.5))], (1, 1)),  # a cavity: the second shell of the official weights
        ([sphere(0.8), sphere(0.5)], (1, 1)),  # swallowed by another part
        ([sphere(0.8), inside_out(sphere(0.5)), sphere(0.2)], (1, 2)),  # an island in a cavity
        ([box((1, 1, 0.2)), box((0.3, 0.3, 0.3), (0, 0, -0.5))], (2, 0)),  # one under the other
        ([], (0, 0)),
    ],
)
def test_shells(parts, expected):
    vertices, faces = joined(*parts) if parts else (np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
    loose = np.concatenate([vertices, [[0.9, 0.9, 0.9]]])  # a vertex without a face is no part
    assert count_shells(loose, faces) == expected
