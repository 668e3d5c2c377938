"""The mean shape and the statistics of the tables, checked against known answers."""

import math

import numpy as np
import pytest
import trimesh

from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf
from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh
from training.evaluation.mean_solid import CELLS, mean_solid, mesh_of_mean, solid_cells
from training.evaluation.metrics import solid_grid, volume_iou
from training.evaluation.score_tables import confidence_interval, format_summary, markdown_table, summarize, win_rate


def test_solid_cells_agree_with_the_mesh():
    mesh = trimesh.util.concatenate([trimesh.creation.icosphere(3, 0.8), trimesh.creation.box((1.9, 0.2, 0.2))])
    sdf = mesh_to_sdf(np.array(mesh.vertices), np.array(mesh.faces), 128)
    assert len(sdf.block_coords) < 16**3 / 3.5  # the inside of the ball is not stored
    surface = sdf_to_mesh(sdf.block_coords, sdf.values, 128)
    for cells in (16, 32, 64):
        cut = solid_cells(sdf.block_coords, sdf.values, 128, cells)
        assert volume_iou(cut, solid_grid(surface.vertices, surface.faces, cells)) > 0.97
    with pytest.raises(ValueError, match="cells"):
        solid_cells(sdf.block_coords, sdf.values, 128, 8)


def test_a_jar_is_not_filled():
    """Its hollow opens only at the mouth, and the inside of its thick wall is not stored."""
    profile = [(0, -0.9), (0.9, -0.9), (0.9, 0.9), (0.6, 0.9), (0.6, -0.6), (0, -0.6)]
    jar = trimesh.creation.revolve(profile, sections=64)
    sdf = mesh_to_sdf(np.array(jar.vertices), np.array(jar.faces), 256)
    solid = solid_cells(sdf.block_coords, sdf.values, 256, 64)
    assert solid.mean() * 8 == pytest.approx(np.pi * (0.9**2 * 0.3 + (0.9**2 - 0.6**2) * 1.5), rel=0.04)
    assert not solid[32, 32, 32:].any()  # the hollow, up to the mouth
    assert solid[32, 32, 8] and solid[32 + 24, 32, 32]  # the bottom and the wall


def test_mean_solid_is_cut_where_it_agrees_best():
    grid = np.stack(np.meshgrid(*[(np.arange(CELLS) + 0.5) / CELLS * 2 - 1] * 3, indexing="ij"), -1)
    radius = np.linalg.norm(grid, axis=-1)
    solids = [(np.packbits(radius < r), [0]) for r in (0.3, 0.6, 0.6, 0.6, 0.9)]
    mean, level, iou = mean_solid(solids)
    assert mean[32, 32, 32] == 1 and mean[32, 32, 63 - 4] == pytest.approx(0.2)
    assert 0.2 < level <= 0.8  # the ball of 0.6
    assert iou == pytest.approx((0.5**3 + 3 + (2 / 3) ** 3) / 5, abs=0.02)
    vertices, faces = mesh_of_mean(mean, level)
    assert np.linalg.norm(vertices, axis=1) == pytest.approx(np.full(len(vertices), 0.6), abs=0.04)
    assert trimesh.Trimesh(vertices, faces).volume > 0

    half = grid[..., 0] < 0  # averaged over all turns, every side is solid as often as not
    mean, *_ = mean_solid([(np.packbits(half), [0, 1, 2, 3])])
    np.testing.assert_allclose(mean, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        mean_solid([])


def test_confidence_interval():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = confidence_interval(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 / 20, values.mean() + 1.96 / 20), abs=0.02)
    assert confidence_interval(values) == (low, high)
    assert confidence_interval([2.0, 2.0]) == (2.0, 2.0)
    assert all(map(math.isnan, confidence_interval([])))


def test_win_rate_and_formats():
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 3]) == pytest.approx(0.625)  # two wins, one tie
    assert win_rate([1, 2], [0, 3], higher_is_better=False) == 0.5
    with pytest.raises(ValueError, match="equally many scores"):
        win_rate([1], [1, 2])
    assert format_summary(summarize([0.5, 0.5]), 10, 1) == "5.0 [5.0, 5.0]"
    assert format_summary(summarize([])) == "–"
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |\n"
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(["a", "b"], [["x"]])
