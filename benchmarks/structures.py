"""Voxels to time attention on: surface-like structures of any size, and the real structure of the parity files.

The surface is a sphere of radius 1 + 0.2 sin 3x sin(3y + 1) sin(3z + 2). A structure is the N voxels of a grid that lie
nearest to it. The resolution makes the shell about 2.5 voxels thick, with about 130 voxels in a block of 8³, as in real
structures.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from d3ds2.geometry.voxels import Voxels

REAL = "latent_index_official.safetensors"


def surface_voxels(num_voxels: int, device: torch.device | str) -> Voxels:
    """Return a sample of exactly `num_voxels` voxels around a curved closed surface."""
    radius = 0.95 * (num_voxels / 37.7) ** 0.5  # the area is about 4.8 pi radius²
    resolution = int(2.7 * radius + 15) // 8 * 8 + 8
    axis = (torch.arange(resolution, device=device) + 0.5 - resolution / 2) / radius
    x, y, z = axis[:, None, None], axis[None, :, None], axis[None, None, :]
    ripple = 0.2 * (3 * x).sin() * (3 * y + 1).sin() * (3 * z + 2).sin()
    distance = ((x * x + y * y + z * z).sqrt() - 1 - ripple).abs().flatten()
    places = distance.topk(num_voxels, largest=False).indices
    xyz = torch.stack(torch.unravel_index(places, (resolution,) * 3), dim=1)
    return Voxels.sort(torch.nn.functional.pad(xyz, (1, 0)), resolution, 1)[0]


def real_voxels(folder: Path, device: torch.device | str, coarsen: int = 1) -> Voxels:
    """Return the 84,820 latent voxels of a real 1024³ structure, or a coarsening of them."""
    xyz = load_file(folder / REAL)["inputs/latent_xyz"].int().to(device)
    voxels = Voxels.sort(torch.nn.functional.pad(xyz, (1, 0)), 128, 1)[0]
    return voxels if coarsen == 1 else voxels.coarsen(coarsen)[0]


def ragged_batch(counts: list[int], device: torch.device | str) -> Voxels:
    """Return surfaces with `counts` voxels in one batch."""
    parts = [surface_voxels(count, device) for count in counts]
    resolution = max(part.resolution for part in parts)
    return Voxels.cat([Voxels.sort(part.coords, resolution, 1)[0] for part in parts])
