"""Preprocessing against the released pipeline's numbers, exact to the last bit."""

import hashlib
import io

import numpy as np
import pytest
import torch
from parity import golden
from PIL import Image

from d3ds2.foreground import cut_out, preprocess
from d3ds2.image_encoder import ImageEncoder, ImageEncoderConfig


def decode(png: torch.Tensor) -> Image.Image:
    return Image.open(io.BytesIO(png.numpy().tobytes()))


@pytest.mark.parametrize("name", ["img53", "img1", "img64"])
def test_preprocess_is_exact(name):
    data = golden("preprocess_image")
    actual = preprocess(cut_out(decode(data.inputs[f"{name}_png"])))
    expected = torch.from_numpy(np.array(decode(data.outputs[f"{name}_out_png"]))).permute(2, 0, 1).float() / 255
    assert torch.equal(actual, expected)
    samples = (actual * 255).round().to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(samples).hexdigest() == data.meta["sha256_of_uint8_chw"][name]


def test_foreground_patches_are_exact():
    data = golden("preprocess_image")
    encoder = ImageEncoder(ImageEncoderConfig(hidden_size=12, depth=1, num_heads=1, mlp_ratio=1))
    names = ["img53", "img1", "img64"]
    images = torch.stack([preprocess(cut_out(decode(data.inputs[f"{name}_png"]))) for name in names])
    with torch.no_grad():
        tokens = encoder(images)
    foreground = tokens.foreground.reshape(3, 5 + 37 * 37)
    assert foreground[:, :5].all()
    for actual, name in zip(foreground[:, 5:], names, strict=True):
        mask = data.outputs[f"{name}_patch_mask"][0].bool()
        assert torch.equal(actual.reshape(37, 37), mask)
    selected = tokens.select_foreground()
    first = selected.sample(0).coords[5:]
    row, column = data.outputs["img53_patch_mask"][0].nonzero().unbind(1)
    assert torch.equal(first[:, 1].long(), column) and torch.equal(first[:, 2].long(), row)
