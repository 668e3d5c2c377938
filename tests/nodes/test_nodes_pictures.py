"""Mesh Pictures over stand-ins of ComfyUI."""

import sys

import pytest
import torch

from tests.support.comfy_stand_ins import MESH

pytestmark = pytest.mark.usefixtures("fresh")


def test_each_side_of_each_mesh_is_drawn(comfy, ball):
    both = MESH(torch.cat([ball.vertices, ball.vertices * 3 + 1]), ball.faces.expand(2, -1, -1))
    out = comfy.run("D3DS2MeshPictures", mesh=both, sides=3, resolution=48)
    image, depth, normals, mask = out.args
    assert image.shape == depth.shape == normals.shape == (6, 48, 48, 3) and mask.shape == (6, 48, 48)
    for picture in (image, depth, normals, mask):
        assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
    torch.testing.assert_close(mask[:3], mask[3:], atol=0.02, rtol=0)  # framed alike, whatever the size and place
    assert 0.1 < mask.mean() < 0.9 and not torch.equal(depth[0], depth[1])
    assert out.ui["status_text"] == ("6 pictures of 48 × 48 pixels",)
    assert [value[:2] for value in comfy.progress] == [(i + 1, 6) for i in range(6)]


def test_what_is_missing_is_named(comfy, ball, monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex", None)
    with pytest.raises(ValueError, match=r"rendering needs embreex, which is not installed: pip install embreex"):
        comfy.run("D3DS2MeshPictures", mesh=ball)
