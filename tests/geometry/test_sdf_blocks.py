"""Smoothing of SDF blocks, against the definition on dense grids in which a missing voxel is NaN."""

import numpy as np
import pytest
import torch

from d3ds2.geometry.sdf_blocks import SDFBlocks
from d3ds2.geometry.voxels import BLOCK

EDGE = 3  # blocks per edge of the grid


def random_blocks(share: float) -> SDFBlocks:
    """Return blocks at random places of two samples."""
    generator = torch.Generator().manual_seed(0)
    coords = (torch.rand(2, EDGE, EDGE, EDGE, generator=generator) < share).nonzero().int()
    values = torch.randn(len(coords), BLOCK, BLOCK, BLOCK, generator=generator, dtype=torch.float64)
    return SDFBlocks(coords, values, EDGE * BLOCK, 2)


def to_dense(blocks: SDFBlocks) -> np.ndarray:
    """Return the values on the whole grid of each sample, NaN elsewhere."""
    dense = np.full((2, *[EDGE * BLOCK] * 3), np.nan)
    for (sample, *place), values in zip(blocks.coords.tolist(), blocks.values.numpy(), strict=True):
        dense[sample][tuple(slice(BLOCK * i, BLOCK * (i + 1)) for i in place)] = values
    return dense


def smoothed_once(dense: np.ndarray) -> np.ndarray:
    """Apply [1 2 1] / 4 along each axis; the voxel itself stands for a missing neighbour."""
    for axis in (1, 2, 3):
        sides = []
        for step in (-1, 1):
            side = np.full_like(dense, np.nan)
            to, of = [slice(None)] * 4, [slice(None)] * 4
            to[axis], of[axis] = (slice(1, None), slice(-1)) if step == -1 else (slice(-1), slice(1, None))
            side[tuple(to)] = dense[tuple(of)]
            sides.append(np.where(np.isnan(side), dense, side))
        dense = (sides[0] + 2 * dense + sides[1]) / 4
    return dense


def test_smoothing_equals_the_definition():
    for share in (0.2, 0.6, 1.0):
        blocks = random_blocks(share)
        expected = smoothed_once(smoothed_once(to_dense(blocks)))
        made = blocks.smoothed(2)
        assert torch.equal(made.coords, blocks.coords)
        np.testing.assert_allclose(to_dense(made), expected, atol=1e-12)


def test_a_flat_sdf_stays_and_nothing_is_changed_without_smoothing():
    blocks = random_blocks(0.5)
    flat = SDFBlocks(blocks.coords, torch.full_like(blocks.values, 0.25), blocks.resolution, 2)
    assert torch.equal(flat.smoothed(3).values, flat.values)
    assert torch.equal(blocks.smoothed(0).values, blocks.values)
    nothing = SDFBlocks(blocks.coords[:0], blocks.values[:0], blocks.resolution, 2)
    assert len(nothing.smoothed(1).values) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_share_of_each_sample_is_brought_below_the_level(dtype):
    blocks = random_blocks(0.6)
    thin = blocks.coords[:, 0] == 1
    values = torch.where(thin[:, None, None, None], 0.1 + 0.3 * blocks.values.abs().clamp(max=1), blocks.values - 0.5)
    values = values.clamp(-1, 1).to(dtype)
    blocks = SDFBlocks(blocks.coords, values, blocks.resolution, 2)
    assert not (values[thin] < 0.06).any() and (values[~thin] < 0.06).float().mean() > 0.3
    made = blocks.filled(0.3, 0.06)
    assert torch.equal(made.values[~thin], values[~thin])  # it has more
    inside = made.values[thin] < 0.06
    assert inside.float().mean() == pytest.approx(0.3, abs=0.01)
    assert values[thin][inside].max() <= values[thin][~inside].min()  # the smallest ones
    shifts = values[thin] - made.values[thin]
    torch.testing.assert_close(shifts, shifts.mean().expand_as(shifts), atol=2e-3, rtol=0)
    assert torch.equal(made.coords, blocks.coords)
    assert blocks.filled(0.0, 0.06) is blocks


def test_the_share_is_one_of_the_blocks_that_tell_of_a_surface():
    """Networks may say "nothing" of most blocks of a structure, and be uncertain in all the others."""
    blocks = random_blocks(0.6)
    first = blocks.coords[:, 0] == 0
    uncertain = first & (torch.arange(len(blocks.coords)) % 5 == 0)
    values = torch.full_like(blocks.values, 0.97)
    values[uncertain] = 0.3 + 0.4 * torch.rand_like(values[uncertain])
    blocks = SDFBlocks(blocks.coords, values, blocks.resolution, 2)
    made = blocks.filled(0.3, 0.06).values
    assert (made[uncertain] < 0.06).float().mean() == pytest.approx(0.3, abs=0.01)
    assert not (made[~uncertain] < 0.06).any()
    assert torch.equal(made[~first], values[~first])  # it has no such block

    values[uncertain, 2:] = 0.95  # a quarter of these blocks remains
    few = SDFBlocks(blocks.coords, values, blocks.resolution, 2).filled(0.3, 0.06).values
    assert (few[uncertain, :2] < 0.061).all() and not (few[uncertain, 2:] < 0.061).any()


def test_where_nothing_is_a_surface_none_is_made():
    blocks = random_blocks(0.5)
    empty = SDFBlocks(blocks.coords, torch.full_like(blocks.values, 0.95), blocks.resolution, 2)
    assert torch.equal(empty.filled(0.3, 0.06).values, empty.values)
    assert len(SDFBlocks(blocks.coords[:0], blocks.values[:0], blocks.resolution, 2).filled(0.3, 0.0).values) == 0
