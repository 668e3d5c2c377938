"""The order of voxels: one integer a voxel, which sorts by sample, 8³ block and place in the block."""

import torch
from torch import Tensor

BLOCK = 8  # voxels along the edge of a selection block: m_slc in the paper, and the SDF voxels of one latent


def sort_keys(coords: Tensor, resolution: int) -> Tensor:
    """Of coords (N, 4) [batch, x, y, z], (N,) int64."""
    blocks_per_edge = -(-resolution // BLOCK)
    block, x, y, z = coords.long().unbind(1)
    for axis in (x, y, z):
        block = torch.add(axis >> 3, block, alpha=blocks_per_edge)  # shifts: CPUs divide int64 slowly
    place = torch.add(torch.add(z & 7, y & 7, alpha=8), x & 7, alpha=64)
    return torch.add(place, block, alpha=BLOCK**3)
