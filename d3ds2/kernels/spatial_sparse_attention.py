"""Spatial sparse attention after the projections (eq. 6-8): the public operation, and its definition.

Sizes named in this file:
    N   tokens, all samples packed      H   query heads           D  channels per head
    Nc  compressed tokens               Hk  key/value heads
"""

import torch
from torch import Tensor

from .block_scores import select_blocks
from .devices import on_triton, triton_works
from .kept import Kept
from .packed_attention import packed_attention, packed_attention_with_lse
from .ragged import AttentionPlan, Ragged
from .selection_attention import selection_attention
from .selection_attention_batched import CHUNK_BYTES


def spatial_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, plan: AttentionPlan,
    top_k: int, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """Return the gated sum of the three branches (eq. 6).

    Args:
        q: queries (N, H, D).
        k, v: keys and values (N, Hk, D).
        compressed_k, compressed_v: keys and values of the compression branch (Nc, Hk, D).
        gates: gates of compression, selection and window, in [0, 1], (N, 3).
        plan: the rows that each branch pairs.
        top_k: number of blocks selected for each query and key/value head.
        kept: where the kernels keep their results, if attention is computed twice.

    Returns:
        (N, H, D). Differentiable in all tensors.
    """
    inputs = q, k, v, compressed_k, compressed_v, gates, plan, top_k
    if not on_triton(q):
        return spatial_sparse_attention_reference(*inputs)
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
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, plan: AttentionPlan,
    top_k: int,
) -> Tensor:  # fmt: skip
    """Definition of `spatial_sparse_attention`: (N, H, D)."""
    samples, compressed = plan.samples, plan.compressed
    counts = samples.lengths, compressed.lengths
    compression, lse = packed_attention_with_lse(
        q, compressed_k, compressed_v, samples.offsets, compressed.offsets, *counts
    )
    if top_k >= plan.max_blocks:  # every query selects all blocks of its sample
        selection = packed_attention(q, k, v, samples.offsets, samples.offsets, samples.lengths, samples.lengths)
    else:
        block_indices = select_blocks(
            q, compressed_k, lse, plan.block_of_compressed, *counts, plan.block_counts, top_k
        )  # eq. 8
        selection = selection_attention(q, k, v, plan.blocks.offsets, block_indices)
    windows = attend_windows(q, k, v, plan.windows)
    branches = zip(gates[:, :, None, None].unbind(1), (compression, selection, windows), strict=True)
    return sum(gate * out for gate, out in branches)


def attend_windows(q: Tensor, k: Tensor, v: Tensor, windows: Ragged) -> Tensor:
    """Attend within the windows: q (N, H, D), k and v (N, Hk, D) -> (N, H, D)."""
    offsets, lengths = windows.offsets, windows.lengths
    if windows.ids is None:
        return packed_attention(q, k, v, offsets, offsets, lengths, lengths)
    q, k, v = (x.index_select(0, windows.ids) for x in (q, k, v))
    return packed_attention(q, k, v, offsets, offsets, lengths, lengths).index_select(0, windows.inverse)
