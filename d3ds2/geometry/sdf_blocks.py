"""A decoded SDF as blocks of 8³ voxels, one for each latent.

Block coordinates take a hundredth of the memory of voxel coordinates.

Sizes named in this file:
    M  blocks, all samples packed      R  SDF voxels per edge
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .voxels import BLOCK, Voxels

NOTHING = 0.9  # of the band: larger values tell of no surface


@dataclass(frozen=True, eq=False)
class SDFBlocks:
    """The SDF at all voxels of the blocks.

    Args:
        coords: (M, 4) int32 [batch, x, y, z] in blocks, lexicographic.
        values: (M, 8, 8, 8) floats, indexed [x, y, z]: distance over the band.
        resolution: R.
        batch_size: number of samples; some may be empty.
    """

    coords: Tensor
    values: Tensor
    resolution: int
    batch_size: int

    @staticmethod
    def of_voxels(sdf: Tensor, voxels: Voxels) -> "SDFBlocks":
        """Return the blocks of an sdf (512 M, 1) on sorted voxels that fill them, as `SDFVAE.decode` returns it."""
        return SDFBlocks(voxels.block_coords, sdf.view(-1, BLOCK, BLOCK, BLOCK), voxels.resolution, voxels.batch_size)

    def to_voxels(self) -> tuple[Tensor, Voxels]:
        """Return the sdf (512 M, 1) and its voxels: the inverse of `of_voxels`."""
        return self.values.reshape(-1, 1), Voxels.of_blocks(self.coords, self.resolution, self.batch_size)

    @cached_property
    def counts(self) -> list[int]:
        """Blocks of each sample, on the host."""
        return torch.bincount(self.coords[:, 0].long(), minlength=self.batch_size).tolist()

    def samples(self) -> list[tuple[Tensor, Tensor]]:
        """Return block coordinates (m, 3) and values (m, 8, 8, 8) of each sample with its m blocks."""
        return [*zip(self.coords[:, 1:].split(self.counts), self.values.split(self.counts), strict=True)]

    def smoothed(self, times: int) -> "SDFBlocks":
        """Smooth the SDF `times` times with the binomial filter [1 2 1] / 4 along each axis.

        That has a standard deviation of sqrt(times / 2) voxels. Where a neighbour is missing, the voxel itself counts.
        """
        if not times:
            return self
        grid, order = Voxels.sort(self.coords, -(-self.resolution // BLOCK), self.batch_size)
        values = self.values[order]
        for _ in range(times):
            for axis, step in ((1, 9), (2, 3), (3, 1)):  # from row 13 of `neighbors`, the block itself
                first, last = values.narrow(axis, 0, 1), values.narrow(axis, BLOCK - 1, 1)
                before = _across(last, grid.neighbors[13 - step], first)
                after = _across(first, grid.neighbors[13 + step], last)
                padded = torch.cat([before, values, after], axis)
                values = (padded.narrow(axis, 0, BLOCK) + padded.narrow(axis, 2, BLOCK)) / 4 + values / 2
        values = torch.empty_like(values).index_copy_(0, order, values)
        return SDFBlocks(self.coords, values, self.resolution, self.batch_size)

    def filled(self, share: float, level: float) -> "SDFBlocks":
        """Shift the values of each sample, if needed, so that at least a share of its voxels lies below a level.

        Where the place of a thin part is uncertain, a predicted mean SDF is nowhere below the level. Its smallest
        values still tell where that part most likely is.

        Args:
            share: in [0, 1), of the voxels in blocks with a value below NOTHING; other blocks tell of no surface.
                Values of NOTHING or more stay above the level. Samples that have the share stay as they are.
        """
        if not share:
            return self
        parts = []
        for _, values in self.samples():
            voxels = int((values.flatten(1).amin(1) < NOTHING).sum()) * BLOCK**3
            number = math.ceil(share * voxels)
            if (values < level).sum() < number:
                in_order = values.flatten().float().sort().values  # kthvalue is not there on all devices
                last = in_order[: min(number, int((in_order < NOTHING).sum()))][-1]
                values = values - (last - level).clamp(min=0).to(values.dtype)
            parts.append(values)
        return SDFBlocks(self.coords, torch.cat(parts), self.resolution, self.batch_size)


def _across(layers: Tensor, rows: Tensor, own: Tensor) -> Tensor:
    """Take one layer of the block in each row (M,), or the block's own where there is none: M of them, of any shape."""
    there = (rows < len(layers)).view(-1, 1, 1, 1)
    return torch.where(there, layers[rows.clamp(max=len(layers) - 1).long()], own)
