"""The names of the released checkpoints, translated to ours and back."""

import pytest
import torch

from d3ds2.official.weights import NAMINGS, our_layout
from tests.support.golden import released_shapes

PARTS = [
    ("model_dense.ckpt", "vae", "structure_vae"),
    ("model_dense.ckpt", "dit", "structure_dit"),
    ("model_sparse_512.ckpt", "vae", "sdf_vae"),
    ("model_sparse_512.ckpt", "dit", "latent_dit"),
    ("model_sparse_1024.ckpt", "dit", "latent_dit"),
    ("model_refiner.ckpt", "refiner", "refiner"),
    ("model_refiner_1024.ckpt", "refiner", "refiner"),
]


@pytest.mark.parametrize(("file", "part", "network"), PARTS)
@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_every_name_goes_there_and_back(version, file, part, network):
    names, naming = released_shapes(version, file, part), NAMINGS[network]
    ours = [naming.ours(name) for name in names]
    assert len(set(ours)) == len(ours)
    assert [naming.official(name) for name in ours] == [*names]


def test_x_fastest_becomes_x_slowest():
    kernel = torch.arange(27.0)[:, None, None].expand(27, 2, 3)  # k = (dx+1) + 3 (dy+1) + 9 (dz+1)
    ours = our_layout("a.conv.kernel", kernel)
    assert ours[9 * 2 + 3 * 1 + 0, 0, 0] == 2 + 3 * 1 + 9 * 0 and ours.is_contiguous()
    assert our_layout("a.conv.kernel", torch.zeros(2, 3)).shape == (3, 2)
    assert our_layout("a.kernel", torch.zeros(8, 2, 3)).shape == (8, 2, 3)  # not a convolution: left unchanged
