"""The rows that spatial sparse attention and its compression pair with each other, from the voxels."""

import torch
from torch import Tensor

from ..kernels.compression import Cells
from ..kernels.ragged import AttentionPlan, Ragged
from .per_grid import per_grid
from .segments import samples_of, tokens_of_cells
from .voxels import BLOCK, Voxels


def block_of_compressed(voxels: Voxels, c: int) -> Tensor:
    """The selection block of each row of `voxels.coarsen(c)`, (Nc,) long."""
    coarse, parent = voxels.coarsen(c)
    blocks = torch.empty(len(coarse), dtype=torch.long, device=voxels.device)
    return blocks.scatter_(0, parent, voxels.block_of_token)  # all children lie in one selection block


@per_grid
def cells_of(voxels: Voxels, c: int) -> Cells:
    """Return the `Cells` of compression with blocks of c³ voxels; all layers and steps share them."""
    coarse, parent = voxels.coarsen(c)
    return Cells(
        samples_of(voxels),
        samples_of(coarse),
        tokens_of_cells(voxels, c),
        parent,
        coarse.coords,
        coarse.neighbors,
        *places_of(voxels, c),
    )


@per_grid
def places_of(voxels: Voxels, c: int) -> tuple[Ragged, Tensor]:
    """Return the voxels at each place in a cell of c³ voxels, and the place of each voxel, (N,) long."""
    x, y, z = (voxels.coords[:, 1:].long() % c).unbind(1)
    place = (x * c + y) * c + z
    ordered, order = place.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(c**3 + 1, device=place.device), out_int32=True)
    return Ragged(offsets, len(place), order.int()), place


def _windows(voxels: Voxels, window: int, shift: int) -> Ragged:
    """The voxels of each window."""
    windows = voxels.windows(shift, window)
    order = None if windows.order is None else windows.order.int()
    return Ragged(windows.cu_seqlens, len(voxels), order, known_lengths=windows.lengths)


@per_grid
def attention_plan(voxels: Voxels, c: int, window: int, shift: int) -> AttentionPlan:
    """Return the plan of the three branches; all layers and steps share it.

    Args:
        c: edge of a compression block, in voxels.
        window, shift: edge of an attention window, and its displacement, in voxels; a window of 0 makes none.
    """
    N, coarse = len(voxels), voxels.coarsen(c)[0]
    blocks, order = block_of_compressed(voxels, c).sort(stable=True)
    edges = torch.arange(voxels.block_offsets.numel(), device=voxels.device)
    in_order = c == BLOCK and voxels.resolution <= BLOCK**2  # all coarse voxels in one block: lexicographic, as blocks
    return AttentionPlan(
        samples=samples_of(voxels),
        compressed=samples_of(coarse),
        blocks=Ragged(voxels.block_offsets, N, longest=max(voxels.windows(0).lengths, default=0)),
        windows=_windows(voxels, window, shift) if window else None,
        children=Ragged(
            torch.searchsorted(blocks, edges, out_int32=True), len(coarse), None if in_order else order.int()
        ),
        sample_blocks=voxels.block_cu_seqlens,
        max_blocks=max(voxels.block_counts, default=0),
        block_counts=voxels.block_counts,
        block_order=None if c == BLOCK else _most_children_first(voxels, blocks),
    )


def _most_children_first(voxels: Voxels, block_of_child: Tensor) -> Tensor:
    """Return the blocks sorted by sample, then by their number in `block_of_child`, most first: (M,) int32."""
    M = voxels.block_offsets.numel() - 1
    children = torch.zeros(M, dtype=torch.long, device=voxels.device)
    children.scatter_add_(0, block_of_child, torch.ones_like(block_of_child))
    blocks = torch.arange(M, device=voxels.device)
    sample = torch.searchsorted(voxels.block_cu_seqlens[1:], blocks, right=True)
    return (sample * (BLOCK**3 + 1) - children).sort(stable=True).indices.int()
