"""On a CUDA device: pictures rendered of surfels are those that the CPU renders."""

import numpy as np
import pytest
import torch

from training.data.datasets import Choice
from training.data.rendered_pictures import RenderedPictures, RenderedPicturesConfig, SidesOfShapes
from training.data.surfels import sample_surfels, surfels_path, write_surfels

pytestmark = pytest.mark.gpu
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def test_a_gpu_renders_the_pictures_of_the_cpu(tmp_path):
    surfels_path(tmp_path, "").parent.mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        rng = np.random.default_rng(seed)
        vertices, colors = rng.uniform(-0.9, 0.9, (4, 3)), rng.integers(0, 256, (4, 3)).astype(np.uint8)
        write_surfels(surfels_path(tmp_path, name), sample_surfels(vertices, FACES, colors, 50000, rng), {})
    choice = Choice(torch.arange(64) % 2, torch.arange(64) % 8, torch.zeros(64).long(), torch.zeros(64).bool())
    drawn = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        pictures = RenderedPictures(SidesOfShapes(str(tmp_path), ["a", "b"], 224), RenderedPicturesConfig(), device)
        moved = Choice(*(column.to(device) for column in choice[:4]))
        drawn.append(pictures.draw(moved, torch.Generator().manual_seed(0)))
    (images, points), (other, other_points) = drawn
    assert (images - other.cpu()).abs().mean() < 0.005  # a point may win a pixel on one device alone
    assert (points - other_points.cpu()).abs().mean() < 0.005
