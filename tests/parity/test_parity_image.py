"""Preprocessing against numbers of the released pipeline, equal to the last bit."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from d3ds2.images.foreground import cut_out, preprocess
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from tests.support.golden import golden, over


def pictures(data) -> list[str]:
    return [key.removesuffix("_png") for key in data.inputs if key.endswith("_png")]


def decode(png: torch.Tensor) -> Image.Image:
    return Image.open(io.BytesIO(png.numpy().tobytes()))


def sha256(tensor: torch.Tensor) -> str:
    """Hash the values as bytes, channels first."""
    return hashlib.sha256((tensor * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()


@over("preprocess_image*")
def test_preprocess_is_exact(name):
    data = golden(name)
    assert pictures(data)
    for picture in pictures(data):
        actual = preprocess(cut_out(decode(data.inputs[f"{picture}_png"])))
        expected = torch.from_numpy(np.array(decode(data.outputs[f"{picture}_out_png"]))).permute(2, 0, 1).float() / 255
        assert torch.equal(actual, expected), picture
        assert sha256(actual) == data.meta["sha256_of_uint8_chw"][picture]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (210, 300, "e8a146226131a5e6830c640b6b6ea2341b33b3b8a752de03090e0412719dc83a"),
        (900, 640, "a7746591c8960a4df2e7f109a0a58c7e734d75b43b935ad2d0e1b533928925f4"),
    ],
)
def test_preprocess_gives_the_recorded_bits(width, height, expected):
    """Check hashes for a picture of our own, recorded when the official pictures came out exactly."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    squares = (20 * x - 9 * width) ** 2 * height**2 + (20 * y - 11 * height) ** 2 * width**2  # of an ellipse
    alpha = np.clip(255 - 255 * (squares - 30 * (width * height) ** 2) // (20 * (width * height) ** 2), 0, 255)
    image = np.stack([(7 * x + 3 * y) % 256, x * y % 256, (5 * y - 2 * x) % 256, alpha], axis=-1).astype(np.uint8)
    tensor = preprocess(cut_out(Image.fromarray(image)))
    assert 0.2 < (tensor[3] > 0).float().mean() < 0.9
    assert sha256(tensor) == expected


@over("preprocess_image*")
def test_foreground_patches_are_exact(name):
    data = golden(name)
    encoder = ImageEncoder(ImageEncoderConfig(hidden_size=12, depth=1, num_heads=1, mlp_ratio=1))
    names = pictures(data)
    images = torch.stack([preprocess(cut_out(decode(data.inputs[f"{picture}_png"]))) for picture in names])
    with torch.no_grad():
        tokens = encoder(images)
    foreground, selected = tokens.foreground.unflatten(0, (len(names), -1)), tokens.select_foreground()
    assert foreground[:, :5].all()
    for i, picture in enumerate(names):
        mask = data.outputs[f"{picture}_patch_mask"][0].bool()
        assert torch.equal(foreground[i, 5:].view(mask.shape), mask)
        coords, (row, column) = selected.sample(i).coords[5:], mask.nonzero().unbind(1)
        assert torch.equal(coords[:, 1].long(), column) and torch.equal(coords[:, 2].long(), row)
