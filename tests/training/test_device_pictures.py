"""Pictures on the device equal those that workers read, and move within their ranges."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.training_data import R, prepared
from training.data.datasets import StructureViews
from training.data.device_pictures import DevicePictures, PictureChoices, draw_motions, move
from training.data.shape_files import list_shapes
from training.data.views import Views
from training.losses import FlowLossConfig, training_times

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    data_dir = prepared(tmp_path_factory)
    return Views(data_dir, list_shapes(data_dir, "train", R)[0], 42, augment=False)


def test_choices_are_the_pictures_and_symmetries_of_the_reading_dataset(views):
    pictures = DevicePictures(views, CPU, workers=1)
    choices = PictureChoices(views, 8, 2, seed=3)
    reading = StructureViews(views, 8, 2, seed=3)
    generator = torch.Generator()
    for step in (0, 5, 17):
        choice, batch = choices[step], reading[step]
        assert torch.equal(choice.shapes, batch.shapes) and torch.equal(choice.symmetries, batch.symmetries)
        drawn, points = pictures.draw(choice, generator, augment=False)
        assert points is None
        # whether the flip comes before or after the cut, the margin may round to the other side
        assert (drawn - batch.images.float() / 255).abs().mean() < 0.02
        assert torch.equal(drawn[~choice.mirrored], batch.images[~choice.mirrored].float() / 255)
        assert choice.mirrored.any() and not choice.mirrored.all()


def move_objects(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move the objects of pictures (B, 4, S, S) on white, as `DevicePictures.draw` does."""
    white = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
    return move(images - white, draw_motions(len(images), CPU, generator)) + white


def disk(size: int) -> torch.Tensor:
    """Return a picture (1, 4, size, size) of a red disk that leaves the margin of inference."""
    place = (torch.arange(size) + 0.5) / size * 2 - 1
    mask = (place[:, None] ** 2 + place**2 < (486 / 518) ** 2).float()
    return torch.stack([torch.ones_like(mask), 1 - mask, 1 - mask, mask])[None]


def test_moved_objects_keep_white_around_and_have_a_margin_of_0_to_32_pixels():
    images = disk(259).repeat(200, 1, 1, 1)
    moved = move_objects(images, torch.Generator().manual_seed(0))
    whole = moved[:, 3, 0].sum(1) == 0  # the object does not touch the upper edge
    assert 150 < whole.sum() <= 200
    torch.testing.assert_close(moved[whole][:, :3, 0], torch.ones_like(moved[whole][:, :3, 0]))
    widths = (moved[whole][:, 3] > 0.5).any(1).sum(1) / 259 * 518
    assert 518 - 64 - 4 <= widths.min() < 460 and 512 < widths.max() <= 518
    red = moved[:, 3] > 0.99
    assert (moved[:, 0][red] > 0.99).all() and (moved[:, 1][red] < 0.01).all()


def test_moves_are_a_function_of_the_generator():
    images = torch.rand((4, 4, 28, 28), generator=torch.Generator().manual_seed(0))
    a, b, c = (move_objects(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_share_of_the_times_is_noise_alone():
    config = FlowLossConfig(noise_alone=0.25)
    t = training_times(4000, config, torch.Generator().manual_seed(0)).numpy()
    assert 0.22 < np.mean(t == 1) < 0.28 and (t > 0).all()
    none = training_times(4000, dataclasses.replace(config, noise_alone=0.0), torch.Generator().manual_seed(0))
    assert (none < 1).all()
    with pytest.raises(ValueError, match=r"loss.noise_alone in \[0, 1\], got 1.5"):
        FlowLossConfig(noise_alone=1.5)
