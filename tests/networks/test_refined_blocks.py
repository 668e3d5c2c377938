"""The blocks of a refined volume give the same mesh as the whole volume, and patches leave no seams."""

import numpy as np
import pytest
import torch

from d3ds2.layers.sparse_conv import mean_pool
from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh
from d3ds2.networks import refiner as refiner_module
from d3ds2.networks.refined_blocks import (
    _mean_of_cells,
    blocks_of_distances,
    blocks_of_signs,
    refine_distances,
    refine_signs,
    signed_slab,
)
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from tests.support.random_voxels import random_voxels

SMALL = {"widths": (4, 8), "layers": 1, "middle_layers": 0}


def smooth_volume(resolution, seed=0):
    coarse = torch.randn(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (resolution,) * 3, mode="trilinear")[0, 0].clamp(-1, 1)


def blocks_of(volume):
    """Return all blocks of a volume: coords (G³, 3), values (G³, 8, 8, 8)."""
    G = len(volume) // 8
    coords = torch.cartesian_prod(*[torch.arange(G)] * 3)
    return coords, volume.view(G, 8, G, 8, G, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 8, 8)


@pytest.mark.parametrize("level", [0.0, 0.4])
def test_crossed_blocks_make_the_mesh_of_the_volume(level):
    volume = smooth_volume(48)
    volume[:, :, 40:] = 1.0  # here blocks are far from the surface; elsewhere the surface meets the border of the grid
    coords, values = blocks_of_distances(volume, level)
    assert 0 < len(coords) < 6**3
    whole = sdf_to_mesh(*(x.numpy() for x in blocks_of(volume)), 48, level)
    part = sdf_to_mesh(coords.numpy(), values.numpy(), 48, level)
    assert np.array_equal(part.vertices, whole.vertices) and np.array_equal(part.faces, whole.faces)


def test_blocks_without_a_crossing_are_left_out():
    volume = torch.ones(64, 64, 64)
    volume[20:40, 20:40, 20:40] = -1
    coords, values = blocks_of_distances(volume, 0.2)
    near = {c for c in np.ndindex(8, 8, 8) if all(2 <= x <= 5 for x in c)}  # crossed edges end at voxels 19 to 40
    assert {tuple(c) for c in coords.tolist()} == near - {(3, 3, 3)}
    assert values.shape == (len(coords), 8, 8, 8)


@pytest.mark.parametrize("whole_blocks", [True, False])
def test_signed_blocks_are_those_of_the_signed_volume(whole_blocks):
    R = 32
    voxels = random_voxels([9], 4) if whole_blocks else random_voxels([3000], R)
    for _ in range(3 if whole_blocks else 0):
        voxels = voxels.subdivide()[0]
    sdf = torch.rand(len(voxels), 1) * 2 - 1
    outside = torch.rand(R // 2, R // 2, R // 2) < 0.9
    volume = torch.where(outside, 1.0, -1.0)
    for dim in range(3):
        volume = volume.repeat_interleave(2, dim)
    volume[tuple(voxels.coords[:, 1:].long().T)] = sdf[:, 0]
    for first, last in ((0, R), (3, 12), (8, 9)):
        assert torch.equal(signed_slab(sdf, voxels, outside, first, last), volume[first:last])
    for actual, expected in zip(
        blocks_of_signs(sdf, voxels, outside, 0.2), blocks_of_distances(volume, 0.2), strict=True
    ):
        assert torch.equal(actual, expected)


def test_mean_of_cells_is_mean_pool():
    voxels = random_voxels([2000], 32)
    sdf = torch.randn(2000, 1)
    pooled, coarse = mean_pool(sdf, voxels, 2)
    expected = torch.ones(16, 16, 16)
    expected[tuple(coarse.coords[:, 1:].long().T)] = pooled[:, 0]
    torch.testing.assert_close(_mean_of_cells(sdf, voxels), expected)


def test_patches_of_a_constant_network_blend_to_a_constant():
    model = Refiner(RefinerConfig(**SMALL, patch_size=24, feature_channels=3)).eval().requires_grad_(False)
    torch.nn.init.zeros_(model.adaptive3.weight_conv.weight)  # it returns 0, which the hook makes 1
    model.adaptive3.register_forward_hook(lambda _m, _a, out: out + 1.0)
    voxels = random_voxels([50], 64)
    calls = []
    volume = refine_distances(model, torch.rand(50, 1), torch.rand(50, 3), voxels, lambda *call: calls.append(call))
    torch.testing.assert_close(volume, torch.full((64, 64, 64), np.tanh(1.0).item()))
    assert calls == [(i + 1, 27) for i in range(27)]


def test_grids_and_samples_that_do_not_fit_are_named():
    refiner = Refiner(RefinerConfig(**SMALL, patch_size=24, feature_channels=3))
    signs = SignRefiner(SignRefinerConfig(**SMALL, patch_size=16))
    voxels = random_voxels([50], 56)
    with pytest.raises(ValueError, match="patches of 24 every 20 voxels cover, got 56"):
        refine_distances(refiner, torch.rand(50, 1), torch.rand(50, 3), voxels)
    with pytest.raises(ValueError, match="patches of 16 every 8 voxels cover, got 28"):
        refine_signs(signs, torch.rand(50, 1), voxels)
    with pytest.raises(ValueError, match="expected one sample, got 2"):
        refine_signs(signs, torch.rand(40, 1), random_voxels([20, 20], 64))


@pytest.mark.parametrize("change", [{"widths": (6,)}, {"widths": ()}, {"patch_size": 7}, {"layers": 0}])
def test_sizes_are_checked(change):
    with pytest.raises(ValueError, match="expected"):
        RefinerConfig(**({"patch_size": 8, "widths": (4, 8)} | change))


def test_gradients_flow_through_a_refiner():
    model = Refiner(RefinerConfig(**SMALL, patch_size=8, feature_channels=3))
    embedded = model.embed_features(torch.rand(512, 3)).t().reshape(1, 4, 8, 8, 8)
    model(torch.rand(1, 1, 8, 8, 8), embedded).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("layers", [1, 2])
def test_pieces_of_a_patch_give_what_the_whole_gives(layers, monkeypatch):
    """Without a gradient, the widest layers run by groups of channels, and convolutions by slabs of the patch."""
    torch.manual_seed(0)
    sizes = {"widths": (8, 16, 32), "layers": layers, "middle_layers": 1, "patch_size": 24}
    signs, refiner = SignRefiner(SignRefinerConfig(**sizes)), Refiner(RefinerConfig(**sizes, feature_channels=4))
    sdf, seen = torch.randn(1, 1, 24, 24, 24), torch.randn(1, 8, 24, 24, 24)
    expected = signs(sdf).detach(), refiner(sdf, seen).detach()
    for size in (1 << 30, 1):
        monkeypatch.setattr(refiner_module, "SLAB_BYTES", size)
        with torch.no_grad():
            torch.testing.assert_close(signs(sdf), expected[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(refiner(sdf, seen), expected[1], rtol=1e-4, atol=1e-4)
