"""All of spatial sparse attention after the projections, in Triton; its definition is in spatial_sparse_attention.py.

The gates cost nothing in the backward pass: a branch's gate scales its weights, and log2 of it goes into their lse.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_scores_triton import select_blocks_triton
from .ragged import AttentionPlan, AttentionSegments
from .ragged_attention_triton import (
    Tile,
    key_norms,
    ragged_attention_dkdv,
    ragged_attention_dq,
    ragged_attention_forward,
)
from .selection_attention_triton import select_backward, select_forward

# forward, dq, dk and dv; measured on an H200: benchmarks/results/attention-h200.md
COMPRESSION = Tile(64, 64, stages=3, registers=80), Tile(64, 64, stages=3), Tile(64, 64, stages=3, splits=48)
WINDOW = Tile(64, 32, stages=3, registers=64), Tile(128, 32, stages=3, registers=128), Tile(64, 64, stages=4)
FP32 = Tile(32, 32), Tile(32, 32), Tile(32, 32, splits=4)
ROWS = 64  # rows of tokens times heads in a program of the kernels here


@triton.jit
def _gated(lse, gate, valid):
    """lse - log2(gate); of a row without keys (-inf) and where the gate is zero, the lse of no weight at all, +inf."""
    b_lse, b_gate = tl.load(lse, mask=valid, other=0.0), tl.load(gate, mask=valid, other=1.0)
    return tl.where((b_lse == float("-inf")) | (b_gate <= 0), float("inf"), b_lse - tl.log2(b_gate))


@triton.jit
def _delta_kernel(
    dout, compression, selection, window, gates, compression_lse, selection_lse, window_lse,
    stats, SIZE, ROWS, HG,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, of BLOCK rows (token, query head): for each branch lse - log2(gate), and the sum of out * dout.

    stats holds such pairs, those of the three branches SIZE numbers apart.
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


def _tiles(q: Tensor, half: tuple[Tile, Tile, Tile]) -> tuple[Tile, Tile, Tile]:
    return FP32 if q.dtype == torch.float32 else half


def _segments(branches: AttentionPlan) -> tuple[AttentionSegments, AttentionSegments]:
    """The segments of the compression branch and of the window branch."""
    return AttentionSegments(branches.samples, branches.compressed), AttentionSegments(
        branches.windows, branches.windows
    )


class _SpatialAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, compressed_k, compressed_v, gates, branches, top_k, scale, keep):
        over_samples, over_windows = _segments(branches)
        compression, compression_lse = ragged_attention_forward(
            q, compressed_k, compressed_v, over_samples, scale, _tiles(q, COMPRESSION)[0]
        )
        block_indices = select_blocks_triton(q, compressed_k, compression_lse, branches, top_k, scale)
        norms = key_norms(k)
        window, window_lse = ragged_attention_forward(q, k, v, over_windows, scale, _tiles(q, WINDOW)[0], norms)
        selection, selection_lse, pairs, out = select_forward(
            q, k, v, branches.blocks, block_indices, scale, (compression, window, gates), keep, norms
        )
        if keep:
            outputs, lses = (compression, selection, window), (compression_lse, selection_lse, window_lse)
            ctx.save_for_backward(q, k, v, compressed_k, compressed_v, gates, *outputs, *lses, block_indices, *pairs)
            ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, compressed_k, compressed_v, gates, *saved = ctx.saved_tensors
        outputs, lses, (block_indices, *pairs) = saved[:3], saved[3:6], saved[6:]
        over_samples, over_windows = _segments(ctx.branches)
        (T, HG, D), scale, dout = q.shape, ctx.scale, dout.contiguous()
        stats = q.new_empty(3, T, HG, 2, dtype=torch.float32)
        _delta_kernel[(triton.cdiv(T * HG, ROWS),)](
            dout, *outputs, gates, *lses, stats, 2 * T * HG, T * HG, HG,
            D=D, DP=triton.next_power_of_2(D), BLOCK=ROWS,
        )  # fmt: skip
        of_branch = [(stats[i], dout, scale) for i in range(3)]
        _, tile_dq, tile_dkdv = _tiles(q, COMPRESSION)
        dq = ragged_attention_dq(q, compressed_k, compressed_v, over_samples, *of_branch[0], tile_dq)
        dkc, dvc = ragged_attention_dkdv(q, compressed_k, compressed_v, over_samples, *of_branch[0], tile_dkdv)
        _, tile_dq, tile_dkdv = _tiles(q, WINDOW)
        dq_window = ragged_attention_dq(q, k, v, over_windows, *of_branch[2], tile_dq)
        dk, dv = ragged_attention_dkdv(q, k, v, over_windows, *of_branch[2], tile_dkdv)
        dq, dks, dvs = select_backward(
            q, k, v, ctx.branches.blocks, block_indices, pairs, *of_branch[1], others=(dq, dq_window)
        )
        dgates = stats[..., 1].sum(-1).t().to(gates.dtype)  # (T, 3)
        return (
            dq, dks.add_(dk).to(k.dtype), dvs.add_(dv).to(v.dtype), dkc.to(k.dtype), dvc.to(v.dtype), dgates,
            None, None, None, None,
        )  # fmt: skip


def spatial_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, branches: AttentionPlan,
    top_k: int, scale: float,
) -> Tensor:  # fmt: skip
    """The same contract as `attend` of spatial_sparse_attention.py, differentiable in the first six."""
    if len(q) == 0:
        return torch.zeros_like(q)
    inputs = (x.contiguous() for x in (q, k, v, compressed_k, compressed_v))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, compressed_k, compressed_v, gates))
    return _SpatialAttention.apply(*inputs, gates.float().contiguous(), branches, top_k, scale, keep)
