"""The rows of voxels cut into segments: those of each sample, and those of each coarser voxel."""

import torch

from ..kernels.ragged import Ragged
from .voxels import BLOCK, Voxels


def samples_of(voxels: Voxels) -> Ragged:
    """The voxels of each sample, B segments."""
    return voxels.cached(("samples",), lambda: _samples(voxels))


def _samples(voxels: Voxels) -> Ragged:
    N = len(voxels)
    lengths = [N] if voxels.batch_size == 1 else vars(voxels).get("counts")  # only if the host knows them already
    return Ragged(voxels.cu_seqlens, N, known_lengths=lengths)


def tokens_of_cells(voxels: Voxels, factor: int) -> Ragged:
    """The voxels of each voxel of `voxels.coarsen(factor)`, a segment for each."""
    return voxels.cached(("cells", factor), lambda: _cells(voxels, factor))


def _cells(voxels: Voxels, factor: int) -> Ragged:
    in_order = factor == BLOCK and voxels.resolution <= BLOCK**2  # one block of coarse voxels: lexicographic as blocks
    order = None if in_order else voxels.coarsen(factor)[1].argsort(stable=True).int()
    offsets = torch.nn.functional.pad(voxels.coarse_counts(factor).cumsum(0), (1, 0)).int()
    return Ragged(offsets, len(voxels), order, longest=factor**3)
