"""Marching cubes on tensors makes the same mesh as the compiled form."""

import numpy as np
import pytest
import torch

from d3ds2.meshes import sdf_to_mesh_gpu as device_meshing
from d3ds2.meshes.flood_fill import pack_bits
from d3ds2.meshes.gap_fill import fill_gaps
from d3ds2.meshes.sdf_to_mesh import DECODED_OPTIONS, sdf_to_mesh
from d3ds2.meshes.sdf_to_mesh_gpu import _pack, _unpack, device_mesh


def assert_same(device, block_coords, values, resolution, level, **options):
    expected = sdf_to_mesh(block_coords.numpy(), values.numpy(), resolution, level, **options)
    actual = device_mesh(block_coords.to(device), values.to(device), resolution, level, **options)
    assert np.array_equal(actual.faces, expected.faces) and actual.faces.dtype == np.int64
    assert actual.vertices.dtype == actual.normals.dtype == np.float32
    np.testing.assert_allclose(actual.vertices, expected.vertices, atol=1e-6)
    np.testing.assert_allclose(actual.normals, expected.normals, atol=1e-4)


def blocks_of(volume, kept):
    """Return some blocks of a volume (R, R, R): coords (B, 3), values (B, 8, 8, 8)."""
    G = len(volume) // 8
    blocks = volume.view(G, 8, G, 8, G, 8).permute(0, 2, 4, 1, 3, 5)
    coords = kept.nonzero()
    return coords, blocks[tuple(coords.T)].contiguous()


def noise(seed, resolution=40, cells=7):
    coarse = torch.randn(1, 1, cells, cells, cells, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (resolution,) * 3, mode="trilinear")[0, 0].clamp(-1, 1)


def ball(resolution=48, radius=15.3):
    axis = torch.arange(resolution) + 0.5 - resolution / 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - radius
    return (distance / 4).clamp(-1, 1)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [0.0, 0.2])
def test_noise_on_all_and_on_some_blocks(device, level, monkeypatch):
    monkeypatch.setattr(device_meshing, "CHUNK", 50)
    for seed in range(3):
        kept = torch.rand(5, 5, 5, generator=torch.Generator().manual_seed(seed)) < (1.1 if seed == 0 else 0.6)
        for options in ({}, DECODED_OPTIONS, {"keep_largest": True}):
            assert_same(device, *blocks_of(noise(seed), kept), 40, level, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_a_band_with_a_gap_and_with_an_inner_shell(device):
    volume = ball()
    band = blocks_of(volume, torch.nn.functional.max_pool3d(1 - volume.abs()[None], 8)[0] > 0)
    assert_same(device, *band, 48, 0.0)
    coords, values = band
    assert_same(device, coords[1:], values[1:], 48, 0.0, **DECODED_OPTIONS)  # a block is missing
    assert_same(device, coords[1:], values[1:], 48, 0.0)
    both_outside = torch.where(values < -0.6, -2 * values - 1.5, values)  # + again further in, as in released weights
    assert_same(device, coords, both_outside.clamp(-1, 1), 48, 0.2, **DECODED_OPTIONS)


@pytest.mark.parametrize("device", DEVICES)
def test_a_surface_at_the_border_of_the_grid(device):
    coords = torch.cartesian_prod(*[torch.arange(2)] * 3)
    assert_same(device, coords, -torch.rand(8, 8, 8, 8), 16, 0.0)


def test_no_surface_and_blocks_given_twice_are_named():
    coords = torch.tensor([[0, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match=r"values on both sides of 0.0, got 1 to 1"):
        device_mesh(coords, torch.ones(2, 8, 8, 8), 16)
    with pytest.raises(ValueError, match="each block once"):
        device_mesh(coords[:1].repeat(2, 1), torch.ones(2, 8, 8, 8), 16)


def test_words_of_a_fill():
    mask = torch.rand(7, 8, 8, 8) < 0.5
    words = _pack(mask)
    assert np.array_equal(words, pack_bits(mask.numpy())) and torch.equal(_unpack(words, mask.device), mask)


def ball_with_a_hole():
    """A ball of 96³ voxels without the 4 x 4 blocks at a pole."""
    volume = ball(96, 40.0)
    coords, values = blocks_of(volume, torch.nn.functional.max_pool3d(1 - volume.abs()[None], 8)[0] > 0)
    kept = ~((coords[:, 0] > 8) & ((coords[:, 1:] - 5.5).abs().amax(1) < 2))
    return coords[kept], values[kept]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [0.0, 0.06])
def test_a_gap_filled_smoothly(device, level):
    assert_same(device, *ball_with_a_hole(), 96, level, **DECODED_OPTIONS)


def test_blocks_that_close_gaps_are_as_if_stored():
    """The mesh is that of the filled blocks' values, and of -1 in the blocks that are solid."""
    coords, values = (tensor.numpy() for tensor in ball_with_a_hole())
    gaps = fill_gaps(
        coords,
        pack_bits(values >= 0),
        lambda axis, layer: values.take(layer, axis + 1).sum((1, 2)),
        lambda axis, layer, rows: values[rows].take(layer, axis + 1),
        12,
    )
    solid = np.argwhere(((gaps.rows < 0) & ~gaps.empty).reshape(12, 12, 12))
    assert len(gaps.coords) > 50 and len(solid) > 50
    filled = np.concatenate([values, gaps.values, np.full((len(solid), 8, 8, 8), -1, np.float32)])
    expected = sdf_to_mesh(np.concatenate([coords, gaps.coords, solid]), filled, 96)
    actual = sdf_to_mesh(coords, values, 96, close_gaps=True)
    assert np.array_equal(actual.vertices, expected.vertices)
    assert {*map(tuple, actual.faces.tolist())} == {*map(tuple, expected.faces.tolist())}
