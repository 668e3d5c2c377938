"""Packed batches of SDF shapes.

Sizes: M blocks = tokens of a batch, N active voxels, B samples, R voxels per edge.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d3ds2.geometry.voxels import BLOCK, PLACES, Voxels
from d3ds2.kernels.device_constant import device_constant
from training.data.crops import Crop
from training.data.shape_files import StoredShape


class ShapeBatch(NamedTuple):
    """SDF blocks of B shapes, sorted by (sample, x, y, z)."""

    block_coords: Tensor  # (M, 4) int32 [batch, x, y, z] at R/8
    sdf: Tensor  # (M, 8, 8, 8) fp16 in [-1, 1]
    sharp: Tensor  # (M, 8, 8, 8) bool
    active: Tensor  # (N,) int32: indices of the voxels inside the band, |sdf| < 1, among all 512 M
    counts: list[list[int]]  # of each sample: active voxels, and voxels at R/2 and R/4 that hold one
    latent_voxels: Voxels  # those of block_coords, with their tables prepared
    resolution: int  # R
    batch_size: int
    crop: Crop | None = None  # what is decoded; None: all


def pack_shapes(shapes: list[StoredShape], resolution: int) -> ShapeBatch:
    """Pack loaded shapes into a batch.

    Raises:
        ValueError: a block is out of order, repeated, outside the grid or without an active voxel.
    """
    blocks, sdf, sharp = zip(*shapes, strict=True)
    B, coords = len(shapes), join_coords(blocks)
    place = np.ravel_multi_index(coords.numpy().T, (B, *[resolution // BLOCK] * 3))  # ValueError outside the grid
    if not (np.diff(place) > 0).all():
        raise ValueError("expected different blocks in lexicographic order")
    latent_voxels = Voxels.sort(coords, resolution // BLOCK, B)[0]
    values = np.concatenate(sdf)
    occupied = values.view(np.uint16) & 0x7FFF < 0x3C00  # |sdf| < 1 in fp16, without numpy's slow conversion
    active = torch.from_numpy(np.flatnonzero(occupied).astype(np.int32))
    counts = []
    for _ in range(3):
        per_block = occupied.reshape(len(coords), -1).sum(1)
        counts.append(np.bincount(coords[:, 0], per_block, minlength=B).astype(int).tolist())
        for axis in (1, 2, 3):
            even, odd = (occupied[(slice(None),) * axis + (slice(i, None, 2),)] for i in (0, 1))
            occupied = even | odd
    if not occupied.all():
        raise ValueError("expected an active voxel in every block")
    return ShapeBatch(
        coords, torch.from_numpy(values), join(sharp), active, counts, latent_voxels.prepared(), resolution, B
    )


def active_voxels(batch: ShapeBatch) -> tuple[Tensor, Voxels]:
    """Return the encoder's input: the SDF (N, 1) float32 of the voxels inside the band, and these voxels at R (eq. 1).

    Waits for nothing on the device: all sizes are those that `pack_shapes` counted.
    """
    block, place = batch.active // BLOCK**3, batch.active % BLOCK**3
    corners = batch.block_coords * device_constant((1, BLOCK, BLOCK, BLOCK), block.device)
    places = device_constant(PLACES, block.device)  # (512, 4)
    # gathered as columns: torch gathers rows as narrow as these slowly on a GPU
    coords = (corners.t().index_select(1, block) + places.t().index_select(1, place)).t()  # (N, 4)
    sdf = batch.sdf.flatten().index_select(0, batch.active).float()[:, None]
    return sdf, Voxels.above(coords, batch.counts, batch.latent_voxels)


def join(arrays: Iterable[np.ndarray]) -> Tensor:
    """Concatenate arrays (m, ...) along their first axis."""
    return torch.from_numpy(np.concatenate(list(arrays)))


def join_coords(coords: Sequence[np.ndarray]) -> Tensor:
    """Join the coordinates (m, 3) of all samples into (M, 4) int32 [batch, x, y, z]."""
    sample = np.arange(len(coords)).repeat([len(c) for c in coords])
    return torch.from_numpy(np.column_stack([sample, np.concatenate(coords)]).astype(np.int32))
