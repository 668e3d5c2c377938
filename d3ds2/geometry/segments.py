"""The rows of voxels cut into segments: those of each sample, and those of each coarser voxel."""

import torch

from ..kernels.ragged import Ragged
from .per_grid import per_grid
from .voxels import BLOCK, Voxels


@per_grid
def samples_of(voxels: Voxels) -> Ragged:
    """The voxels of each sample, B segments."""
    N = len(voxels)
    known = voxels.tables.get(Voxels.counts.key())  # only if the host already has them: computing them makes it wait
    return Ragged(voxels.cu_seqlens, N, known_lengths=[N] if voxels.batch_size == 1 else known)


@per_grid
def tokens_of_cells(voxels: Voxels, factor: int) -> Ragged:
    """The voxels inside each voxel of `voxels.coarsen(factor)`, one segment for each."""
    in_order = factor == BLOCK and voxels.resolution <= BLOCK**2  # coarse voxels in one block: lexicographic, as blocks
    order = None if in_order else voxels.coarsen(factor)[1].argsort(stable=True).int()
    offsets = torch.nn.functional.pad(voxels.coarse_counts(factor).cumsum(0), (1, 0)).int()
    return Ragged(offsets, len(voxels), order, longest=factor**3)
