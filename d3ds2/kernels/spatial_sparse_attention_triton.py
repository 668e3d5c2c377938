"""Spatial sparse attention after the projections, in Triton; its definition is in spatial_sparse_attention.py.

The gates cost nothing in the backward pass: a gate is a factor on the softmax weights of its branch, so its log2 is
subtracted from their lse.

Sizes named in this file:
    T  tokens      HG  query heads      D  channels per head
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_tiles import AttentionTiles, Tile
from .block_scores_triton import select_blocks_triton
from .kept import Kept, computed
from .ragged import AttentionPlan, AttentionSegments, Ragged
from .ragged_attention_triton import key_norms, ragged_attention_dkdv, ragged_attention_dq, ragged_attention_forward
from .selection_attention_triton import select_backward, select_forward

# measured on an H200: benchmarks/results/attention-h200.md
COMPRESSION = AttentionTiles(
    forward=Tile(64, 64, stages=3, registers=80),
    dq=Tile(64, 64, stages=3),
    dkdv=Tile(64, 64, stages=3, splits=48),
)
WINDOW = AttentionTiles(
    forward=Tile(64, 32, stages=3, registers=64),
    dq=Tile(128, 32, stages=3, registers=128),
    dkdv=Tile(64, 64, stages=4),
)
FP32 = AttentionTiles(forward=Tile(32, 32), dq=Tile(32, 32), dkdv=Tile(32, 32, splits=4))
DELTA_ROWS = 64  # rows (token, query head) of a program of `_delta_kernel`


@triton.jit
def _gated(lse, gate, valid):
    """Return lse - log2(gate). Where a row has no keys or its gate is zero, return +inf, which makes all weights 0."""
    b_lse, b_gate = tl.load(lse, mask=valid, other=0.0), tl.load(gate, mask=valid, other=1.0)
    return tl.where((b_lse == float("-inf")) | (b_gate <= 0), float("inf"), b_lse - tl.log2(b_gate))


@triton.jit(do_not_specialize=["SIZE", "ROWS"])
def _delta_kernel(
    dout, compression, selection, window, gates, compression_lse, selection_lse, window_lse,
    stats, SIZE, ROWS, HG,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, for BLOCK rows (token, query head): lse - log2(gate) and the sum of out * dout of each branch.

    The two stand side by side in stats; the branches are SIZE numbers apart.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DP)
    valid = row < ROWS
    at, mask = row[:, None] * D + offs_d, valid[:, None] & (offs_d < D)
    b_do = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
    token = gates + row // HG * 3
    b_o = tl.load(compression + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(stats + row * 2, _gated(compression_lse + row, token, valid), mask=valid)
    tl.store(stats + row * 2 + 1, tl.sum(b_o * b_do, 1), mask=valid)
    b_o = tl.load(selection + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(stats + SIZE + row * 2, _gated(selection_lse + row, token + 1, valid), mask=valid)
    tl.store(stats + SIZE + row * 2 + 1, tl.sum(b_o * b_do, 1), mask=valid)
    b_o = tl.load(window + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(stats + 2 * SIZE + row * 2, _gated(window_lse + row, token + 2, valid), mask=valid)
    tl.store(stats + 2 * SIZE + row * 2 + 1, tl.sum(b_o * b_do, 1), mask=valid)


def _tiles(q: Tensor) -> tuple[AttentionTiles, AttentionTiles]:
    """The tiles of the compression branch and of the window branch."""
    return (FP32, FP32) if q.dtype == torch.float32 else (COMPRESSION, WINDOW)


def _segments(plan: AttentionPlan) -> tuple[AttentionSegments, AttentionSegments]:
    """The segments of the compression branch and of the window branch."""
    assert isinstance(plan.windows, Ragged)  # other windows do not come here
    return AttentionSegments(plan.samples, plan.compressed), AttentionSegments(plan.windows, plan.windows)


def _attend(q, k, v, compressed_k, compressed_v, gates, plan, top_k, scale, keep) -> list[Tensor]:
    """Return the gated sum and, to `keep`, outputs and lse of the three branches, the selected blocks and the pairs."""
    over_samples, over_windows = _segments(plan)
    compression_tiles, window_tiles = _tiles(q)
    compression, compression_lse = ragged_attention_forward(
        q, compressed_k, compressed_v, over_samples, scale, compression_tiles.forward
    )
    block_indices = select_blocks_triton(q, compressed_k, compression_lse, plan, top_k, scale)
    norms = key_norms(k)
    window, window_lse = ragged_attention_forward(q, k, v, over_windows, scale, window_tiles.forward, norms)
    selection, selection_lse, pairs, out = select_forward(
        q, k, v, plan.blocks, block_indices, scale, (compression, window, gates), keep, norms
    )
    outputs, lses = (compression, selection, window), (compression_lse, selection_lse, window_lse)
    return [out, *outputs, *lses, block_indices, *pairs] if keep else [out]


class _SpatialSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, compressed_k, compressed_v, gates, plan, top_k, scale, keep, kept):
        inputs = q, k, v, compressed_k, compressed_v, gates
        out, *saved = computed(kept, lambda: _attend(*inputs, plan, top_k, scale, keep))
        if keep:
            ctx.save_for_backward(*inputs, *saved)
            ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (
            q, k, v, compressed_k, compressed_v, gates, compression, selection, window,
            compression_lse, selection_lse, window_lse, block_indices, *pairs,
        ) = ctx.saved_tensors  # fmt: skip
        (T, HG, D), scale, dout = q.shape, ctx.scale, dout.contiguous()
        stats = q.new_empty(3, T, HG, 2, dtype=torch.float32)
        _delta_kernel[(triton.cdiv(T * HG, DELTA_ROWS),)](
            dout, compression, selection, window, gates, compression_lse, selection_lse, window_lse,
            stats, 2 * T * HG, T * HG, HG, D=D, DP=triton.next_power_of_2(D), BLOCK=DELTA_ROWS,
        )  # fmt: skip
        compression_stats, selection_stats, window_stats = stats.unbind()
        over_samples, over_windows = _segments(ctx.plan)
        compression_tiles, window_tiles = _tiles(q)
        inputs = q, compressed_k, compressed_v, over_samples, compression_stats, dout, scale
        dq_compression = ragged_attention_dq(*inputs, compression_tiles.dq)
        dcompressed_k, dcompressed_v = ragged_attention_dkdv(*inputs, compression_tiles.dkdv)
        inputs = q, k, v, over_windows, window_stats, dout, scale
        dq_window = ragged_attention_dq(*inputs, window_tiles.dq)
        dk_window, dv_window = ragged_attention_dkdv(*inputs, window_tiles.dkdv)
        dq, dk, dv = select_backward(
            q, k, v, ctx.plan.blocks, block_indices, pairs, selection_stats, dout, scale,
            others=(dq_compression, dq_window),
        )  # fmt: skip
        dk, dv = dk.add_(dk_window).to(k.dtype), dv.add_(dv_window).to(v.dtype)
        dcompressed_k, dcompressed_v = dcompressed_k.to(k.dtype), dcompressed_v.to(v.dtype)
        dgates = stats[..., 1].sum(-1).t().to(gates.dtype)  # (T, 3)
        return dq, dk, dv, dcompressed_k, dcompressed_v, dgates, None, None, None, None, None


def spatial_sparse_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, plan: AttentionPlan,
    top_k: int, scale: float, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """`spatial_sparse_attention` with a factor `scale` on the scores: (N, H, D). Differentiable in all tensors."""
    if len(q) == 0:
        return torch.zeros_like(q)
    inputs = (x.contiguous() for x in (q, k, v, compressed_k, compressed_v))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, compressed_k, compressed_v, gates))
    return _SpatialSparseAttention.apply(*inputs, gates.float().contiguous(), plan, top_k, scale, keep, kept)
