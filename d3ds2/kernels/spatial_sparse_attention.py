"""Spatial sparse attention after the projections (eq. 6-8): the public operation, and its definition.

Of the three branches some may be left out: compression and selection, selection alone, or the windows. What is left is
then the sum of one operation for each branch; the kernel of all three is for all three.

Sizes named in this file:
    N   tokens, all samples packed      H   query heads           D  channels per head
    Nc  compressed tokens               Hk  key/value heads
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .block_scores import select_blocks
from .devices import on_triton, triton_works
from .kept import Kept
from .packed_attention import packed_attention, packed_attention_with_lse
from .ragged import AttentionPlan, Ragged
from .selection_attention import selection_attention
from .selection_attention_batched import CHUNK_BYTES
from .sliding_window import SlidingWindow, sliding_window_attention


def spatial_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor | None, compressed_v: Tensor | None, gates: Tensor,
    plan: AttentionPlan, top_k: int, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """Return the gated sum of the branches (eq. 6).

    Args:
        q: queries (N, H, D).
        k, v: keys and values (N, Hk, D).
        compressed_k, compressed_v: keys and values of the compression branch (Nc, Hk, D); None without compression,
            and then without selection.
        gates: gates of compression, selection and window, in [0, 1], (N, 3); a branch left out has no column.
        plan: the rows that each branch pairs; its windows may be None.
        top_k: number of blocks selected for each query and key/value head; 0 without selection.
        kept: where the kernel of all three branches keeps its results, if attention is computed twice.

    Returns:
        (N, H, D). Differentiable in all tensors.
    """
    inputs = q, k, v, compressed_k, compressed_v, gates, plan, top_k
    if not on_triton(q):
        return spatial_sparse_attention_reference(*inputs)
    if compressed_k is None or not top_k or not isinstance(plan.windows, Ragged):
        return _sum_of_branches(*inputs, _select_on_triton)
    if torch.compiler.is_compiling():
        from .uncompiled import spatial_sparse_attention_triton
    else:
        from .spatial_sparse_attention_triton import spatial_sparse_attention_triton
    return spatial_sparse_attention_triton(*inputs, q.shape[2] ** -0.5, kept)


def workspace_bytes(device: torch.device) -> int:
    """Count the bytes that attention takes without Triton beside its inputs and results, whatever their number.

    Pairs of a query and a block are copied, and attended, a chunk at a time; the scores of blocks take less.
    """
    return 0 if triton_works(device) else 5 * CHUNK_BYTES // 2


def spatial_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor | None, compressed_v: Tensor | None, gates: Tensor,
    plan: AttentionPlan, top_k: int,
) -> Tensor:  # fmt: skip
    """Definition of `spatial_sparse_attention`: (N, H, D)."""
    return _sum_of_branches(q, k, v, compressed_k, compressed_v, gates, plan, top_k, _select)


def _sum_of_branches(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor | None, compressed_v: Tensor | None, gates: Tensor,
    plan: AttentionPlan, top_k: int, select: Callable[[Tensor, Tensor, Tensor, AttentionPlan, int], Tensor],
) -> Tensor:  # fmt: skip
    """Compute one branch after the other; `select` returns the blocks (N, Hk, top_k) of q, compressed_k and lse."""
    samples, compressed, outputs = plan.samples, plan.compressed, []
    if compressed_k is not None and compressed_v is not None:
        compression, lse = packed_attention_with_lse(
            q, compressed_k, compressed_v, samples.offsets, compressed.offsets, samples.lengths, compressed.lengths
        )
        outputs.append(compression)
        if top_k >= plan.max_blocks:  # every query selects all blocks of its sample
            everything = samples.offsets, samples.offsets, samples.lengths, samples.lengths
            outputs.append(packed_attention(q, k, v, *everything))
        elif top_k:
            block_indices = select(q, compressed_k, lse, plan, top_k)  # eq. 8
            outputs.append(selection_attention(q, k, v, plan.blocks.offsets, block_indices))
    if plan.windows is not None:
        outputs.append(attend_windows(q, k, v, plan.windows))
    return sum(gate * out for gate, out in zip(gates[:, :, None, None].unbind(1), outputs, strict=True))


def _select(q: Tensor, compressed_k: Tensor, lse: Tensor, plan: AttentionPlan, top_k: int) -> Tensor:
    counts = plan.samples.lengths, plan.compressed.lengths, plan.block_counts
    return select_blocks(q, compressed_k, lse, plan.block_of_compressed, *counts, top_k)


def _select_on_triton(q: Tensor, compressed_k: Tensor, lse: Tensor, plan: AttentionPlan, top_k: int) -> Tensor:
    from .block_scores_triton import LOG2_E, select_blocks_triton

    q, compressed_k, lse = (x.detach().contiguous() for x in (q, compressed_k, lse * LOG2_E))
    return select_blocks_triton(q, compressed_k, lse, plan, top_k, q.shape[2] ** -0.5)


def attend_windows(q: Tensor, k: Tensor, v: Tensor, windows: Ragged | SlidingWindow) -> Tensor:
    """Attend within the windows: q (N, H, D), k and v (N, Hk, D) -> (N, H, D)."""
    if isinstance(windows, SlidingWindow):
        return sliding_window_attention(q, k, v, windows)
    offsets, lengths = windows.offsets, windows.lengths
    if windows.ids is None:
        return packed_attention(q, k, v, offsets, offsets, lengths, lengths)
    q, k, v = (x.index_select(0, windows.ids) for x in (q, k, v))
    return packed_attention(q, k, v, offsets, offsets, lengths, lengths).index_select(0, windows.inverse)
