"""Voxels at random places."""

import torch
from torch import Tensor

from d3ds2.geometry.voxels import Voxels


def random_coords(counts: list[int], resolution: int, seed: int = 0) -> Tensor:
    """Return coords (N, 4) int32 of `counts[b]` different voxels in sample b. Only the samples are in order."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.cat([torch.randperm(resolution**3, generator=generator)[:count] for count in counts])
    xyz = torch.stack(torch.unravel_index(places, (resolution,) * 3), dim=1)
    batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.cat([batch[:, None], xyz], dim=1).int()


def random_voxels(counts: list[int], resolution: int, seed: int = 0) -> Voxels:
    """Return the voxels at `random_coords`."""
    return Voxels.sort(random_coords(counts, resolution, seed), resolution, len(counts))[0]
