"""Random crops of a batch: the decoder of the SDF VAE upsamples one cube of each shape, so that 1024³ fits a GPU.

The encoder and the transformers see whole shapes. The upsampling part sees the latents of a cube and a margin around
it; the loss counts the voxels of the cube alone. Their values depend on latents at most three away
(`networks/chunked_decode.py`), so with a margin of three or more they are those of the whole shape.

Sizes: M blocks = latents of a batch, P latents in the cubes and their margins, K in the cubes alone, G blocks per edge.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d3ds2.geometry.voxels import Voxels


class Crop(NamedTuple):
    """The latents that are upsampled, and the blocks among them that count."""

    rows: Tensor  # (P,) int64: rows of the batch's latent voxels
    voxels: Voxels  # (P): these, prepared
    decoded: Tensor  # (K,) int64: the blocks that count, among the P that are decoded
    blocks: Tensor  # (K,) int64: the same, among the M of the batch


def draw_crop(
    block_coords: Tensor, latent_voxels: Voxels, edge: int, margin: int, generators: Sequence[np.random.Generator]
) -> Crop:
    """Draw a cube of each shape, which holds at least one of its latents.

    Args:
        block_coords: (M, 4) int32, lexicographic: the order in which blocks are stored and decoded.
        latent_voxels: those of block_coords in their own order.
        edge, margin: latents per edge of a cube, and around it.
        generators: one for each shape.
    """
    G = latent_voxels.resolution
    coords, latents = block_coords.numpy(), latent_voxels.coords.numpy()
    low = np.array([_corner(coords[coords[:, 0] == b, 1:], edge, G, rng) for b, rng in enumerate(generators)])
    near, rows = (_inside(c, low - margin, edge + 2 * margin) for c in (coords, latents))  # (M,) bool each
    counts = _inside(coords, low, edge)
    voxels = Voxels(latent_voxels.coords[torch.from_numpy(rows)], G, latent_voxels.batch_size, check=False)
    return Crop(
        torch.from_numpy(np.flatnonzero(rows)),
        voxels.prepared(),
        torch.from_numpy(np.flatnonzero(counts[near])),
        torch.from_numpy(np.flatnonzero(counts)),
    )


def _corner(coords: np.ndarray, edge: int, grid: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the lowest corner (3,) of a cube around a random one of the latents (m, 3), inside the grid if it fits."""
    latent = coords[rng.integers(len(coords))]
    return np.clip(latent - rng.integers(edge, size=3), 0, max(grid - edge, 0))


def _inside(coords: np.ndarray, low: np.ndarray, edge: int) -> np.ndarray:
    """Whether each of the coordinates (M, 4) lies in the cube of its shape, whose lowest corners are `low` (B, 3)."""
    place = coords[:, 1:] - low[coords[:, 0]]
    return ((place >= 0) & (place < edge)).all(1)
