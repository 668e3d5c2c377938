"""The eight symmetries: grids, voxels, vertices and cameras move together."""

import numpy as np
import pytest

from d3ds2.images.render import direction
from training.data.symmetry import NUM_SYMMETRIES, facing, inverse, transform_grid, transform_vertices, transform_voxels


@pytest.mark.parametrize("symmetry", range(NUM_SYMMETRIES))
def test_grid_voxels_and_vertices_agree(symmetry):
    R = 6
    grid = np.random.default_rng(0).random((2, R, R, R))
    voxels = np.stack(np.meshgrid(*[np.arange(R)] * 3, indexing="ij"), -1).reshape(-1, 3)
    moved = transform_voxels(voxels, R, symmetry)
    after = transform_grid(grid, symmetry)
    assert np.array_equal(after[:, *moved.T], grid[:, *voxels.T])
    centres = (voxels + 0.5) / R * 2 - 1
    np.testing.assert_allclose(transform_vertices(centres, symmetry), (moved + 0.5) / R * 2 - 1, atol=1e-12)


@pytest.mark.parametrize("symmetry", range(NUM_SYMMETRIES))
def test_inverse_undoes_a_symmetry(symmetry):
    grid = np.random.default_rng(0).random((5, 5, 5))
    assert np.array_equal(transform_grid(transform_grid(grid, symmetry), inverse(symmetry)), grid)


def test_all_eight_differ_and_keep_up():
    point = np.array([[0.1, 0.2, 0.5]])
    images = {tuple(transform_vertices(point, s)[0].round(6)) for s in range(NUM_SYMMETRIES)}
    assert len(images) == 8 and all(y == 0.2 for _, y, _ in images)


@pytest.mark.parametrize("azimuth", [-180, -134, -91, -45.5, -20, 0, 44, 46, 90, 133, 179])
def test_facing_brings_the_camera_to_the_front(azimuth):
    symmetry, rest = facing(azimuth)
    assert -45 <= rest <= 45 and 0 <= symmetry < 4
    camera = transform_vertices(direction(20, azimuth)[None], symmetry)[0]
    np.testing.assert_allclose(camera, direction(20, rest), atol=1e-6)


def test_unknown_symmetry_is_an_error():
    with pytest.raises(ValueError, match="from 0 to 7, got 8"):
        transform_voxels(np.zeros((1, 3), int), 8, 8)
