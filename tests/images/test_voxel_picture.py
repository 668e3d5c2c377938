"""The picture of voxels: where they are seen, and which hide others."""

import numpy as np
import pytest

from d3ds2.images.voxel_picture import BACKGROUND, latent_colors, voxel_picture


def drawn(coords, resolution=8, size=160, **colors) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture (H, W, 3) and the mask (H, W) of its foreground."""
    picture = np.asarray(voxel_picture(np.array(coords).reshape(-1, 3), resolution, size, **colors))
    return picture, (picture != BACKGROUND).any(-1)


def centre(mask) -> tuple[float, float]:
    rows, columns = mask.nonzero()
    return rows.mean(), columns.mean()


def test_y_is_up_and_x_is_right_and_z_comes_nearer():
    base = centre(drawn([3, 3, 3])[1])
    up, right, near = (centre(drawn(c)[1]) for c in ([3, 7, 3], [7, 3, 3], [3, 3, 7]))
    assert up[0] < base[0] - 20 and abs(up[1] - base[1]) < 2
    assert right[1] > base[1] + 20 and near[1] < base[1] - 10 and near[0] > base[0] + 10


def test_a_voxel_shows_three_faces_and_the_top_is_lightest():
    picture, mask = drawn([0, 0, 0], 1, 100)
    shades = np.unique(picture[mask][:, 0])
    assert len(shades) == 3 and picture[mask].mean() > 60
    rows, columns = mask.nonzero()
    assert picture[rows.min() + 3, columns[rows == rows.min()].mean().astype(int), 0] == shades.max()
    assert mask.mean() > 0.4 and not (mask[0] | mask[-1]).any() and not (mask[:, 0] | mask[:, -1]).any()


def test_the_nearer_voxel_hides_the_farther_in_any_order():
    coords = np.array([[0, 0, 0], [4, 4, 4]])  # along the line of sight, nearly
    red_near = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    one, _ = drawn(coords, colors=red_near)
    other, _ = drawn(coords[::-1], colors=red_near[::-1])
    assert np.array_equal(one, other)
    full = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    outer = (full == 7).any(1)
    colors = np.where(outer[:, None], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    picture, mask = drawn(full, colors=colors)
    assert picture[mask][:, 2].max() == 0  # nothing shines through the three faces in front


@pytest.mark.parametrize("resolution", [1, 32, 128, 1024])
def test_any_resolution_is_drawn(resolution):
    corners = np.array([[0, 0, 0], [1, 1, 1]]) * (resolution - 1)
    assert drawn(corners, resolution)[1].any()


def test_nothing_gives_an_empty_picture():
    picture, mask = drawn([])
    assert picture.shape == (160, 160, 3) and not mask.any()


def test_latents_become_colours():
    colors = latent_colors(np.random.default_rng(0).normal(size=(100, 16)) * 3)
    assert colors.shape == (100, 3) and colors.min() == 0 and colors.max() == 1
