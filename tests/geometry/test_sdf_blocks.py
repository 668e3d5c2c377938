"""Smoothing of SDF blocks, against the definition on dense grids in which a missing voxel is NaN."""

import numpy as np
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
