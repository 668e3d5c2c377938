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
