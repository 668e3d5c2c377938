"""A decoded SDF as blocks of 8³ voxels, one for each latent.

Block coordinates take a hundredth of the memory of voxel coordinates.

Sizes named in this file:
    M  blocks, all samples packed      R  SDF voxels per edge
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .voxels import BLOCK, Voxels


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
        values = self.values
        sides = [(axis, self._rows_beside(axis, -1), self._rows_beside(axis, 1)) for axis in (1, 2, 3) if times]
        for _ in range(times):
            for axis, before, after in sides:
                first, last = values.narrow(axis, 0, 1), values.narrow(axis, BLOCK - 1, 1)
                padded = torch.cat([last[before], values, first[after]], axis)  # (.., 10, ..)
                for rows, place, border in ((before, 0, first), (after, BLOCK + 1, last)):
                    missing = (rows < 0).view(-1, 1, 1, 1)
                    padded.narrow(axis, place, 1).copy_(torch.where(missing, border, padded.narrow(axis, place, 1)))
                values = (padded.narrow(axis, 0, BLOCK) + padded.narrow(axis, 2, BLOCK)) / 4 + values / 2
        return SDFBlocks(self.coords, values, self.resolution, self.batch_size)

    def _rows_beside(self, axis: int, step: int) -> Tensor:
        """Return the row of the block beside each one along an axis (1, 2 or 3), or -1 where there is none: (M,)."""
        edge = -(-self.resolution // BLOCK) + 2  # with a border, so that no step leaves the sample
        sizes = torch.tensor([edge**3, edge**2, edge, 1], device=self.coords.device)
        keys = ((self.coords.long() + 1) * sizes).sum(1)  # ascending, as the coordinates are lexicographic
        wanted = keys + step * sizes[axis]
        found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return torch.where(keys[found] == wanted, found, -1)
