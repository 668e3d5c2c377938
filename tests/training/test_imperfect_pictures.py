"""Imperfect pictures: JPEG against Pillow, blur against a definition, and what the whole keeps and changes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.imperfect_pictures import blur, jpeg, make_imperfect


def disk(size: int, number: int) -> torch.Tensor:
    """Return pictures (number, 4, size, size) of a red disk on white."""
    place = (torch.arange(size) + 0.5) / size * 2 - 1
    mask = (place[:, None] ** 2 + place**2 < 0.8**2).float()
    return torch.stack([torch.ones_like(mask), 1 - 0.8 * mask, 1 - 0.9 * mask, mask]).repeat(number, 1, 1, 1)


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_jpeg_is_that_of_pillow(quality):
    smooth = np.random.default_rng(0).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((52, 52), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    expected = np.asarray(Image.open(file)).astype(np.float32)
    ours = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    made = jpeg(ours, torch.full((1, 1, 1, 1), float(quality)))[0].permute(1, 2, 0).numpy() * 255
    changed = np.abs(np.asarray(picture).astype(np.float32) - expected).mean()
    assert np.abs(made - expected).mean() < 1  # of 255: Pillow rounds in between
    assert np.abs(made - expected).mean() < 0.5 * changed


def test_blur_spreads_a_point_as_a_gaussian():
    images = torch.zeros(2, 1, 15, 15)
    images[:, :, 7, 7] = 1
    made = blur(images, torch.tensor([0.5, 1.2]).view(2, 1, 1, 1))
    torch.testing.assert_close(made.sum((1, 2, 3)), torch.ones(2))
    offsets = torch.arange(-4, 5)
    line = (-0.5 * (offsets / 1.2) ** 2).exp()
    line = line / line.sum()
    torch.testing.assert_close(made[1, 0, 3:12, 3:12], line[:, None] * line)


def test_pictures_stay_pictures_of_an_object_on_white():
    images = disk(112, 150)
    made = make_imperfect(images, torch.Generator().manual_seed(0))
    assert made.shape == images.shape and made.min() >= 0 and made.max() <= 1
    outside = made[:, 3] == 0
    assert (made[:, :3].amin(1)[outside] > 0.999).all()  # white where the mask is empty
    covered = made[:, 3].sum((1, 2)) / images[:, 3].sum((1, 2))
    assert 0.5 < covered.min() < 0.95 and 1.02 < covered.max() < 1.3  # a hole, a mask that has grown
    same = (made == images).flatten(1).all(1).float().mean()
    assert 0.2 < same < 0.45
    assert (made[:, 3] > 0.5)[:, 56, 56].float().mean() > 0.95  # few have a hole in their middle


def test_changes_are_a_function_of_the_generator_and_of_the_row():
    images = torch.rand(4, 4, 28, 28, generator=torch.Generator().manual_seed(1))

    def part(_, make):
        return make(4)[[1, 3]]

    whole = make_imperfect(images, torch.Generator().manual_seed(2))
    assert torch.equal(whole, make_imperfect(images, torch.Generator().manual_seed(2)))
    assert not torch.equal(whole, make_imperfect(images, torch.Generator().manual_seed(3)))
    rows = make_imperfect(images[[1, 3]], torch.Generator().manual_seed(2), part)
    torch.testing.assert_close(rows, whole[[1, 3]])
