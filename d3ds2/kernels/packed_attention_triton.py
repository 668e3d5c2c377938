"""Softmax attention over packed samples, by the kernels of ragged_attention_triton.py.

The definition is in packed_attention.py.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_stats_triton import attention_stats
from .attention_tiles import AttentionTiles, Tile
from .kept import Kept, computed
from .ragged import AttentionSegments, Ragged
from .ragged_attention_triton import ragged_attention_dkdv, ragged_attention_dq, ragged_attention_forward

TILES = AttentionTiles(  # for D up to 32
    forward=Tile(64, 64, stages=3, registers=80),
    dq=Tile(64, 64, stages=3),
    dkdv=Tile(128, 64, stages=3),
)
# Wider heads take smaller tiles or more warps, so that accumulators stay in registers, and the pipeline in the shared
# memory of small cards: compiled for sm_80 to sm_120 by tests/support/compile_launches.py
TILES_64 = AttentionTiles(forward=Tile(64, 64, stages=3), dq=Tile(64, 32, stages=3), dkdv=Tile(64, 64))
TILES_128 = AttentionTiles(forward=Tile(64, 32, warps=8, stages=3), dq=Tile(32, 32), dkdv=Tile(64, 32, warps=8))
ENOUGH_PROGRAMS = 6000  # of dk and dv: where keys are few, their queries are split to make so many
MAX_SPLITS = 16


def _tiles(D: int) -> AttentionTiles:
    return TILES if D <= 32 else TILES_64 if D <= 64 else TILES_128


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, kept):
        ctx.segments = AttentionSegments(Ragged(cu_seqlens_q, len(q)), Ragged(cu_seqlens_k, len(k)))
        ctx.scale = scale
        tile = _tiles(q.shape[2]).forward
        out, lse = computed(kept, lambda: ragged_attention_forward(q, k, v, ctx.segments, scale, tile))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        stats = attention_stats(lse, out, dout)  # (Tq, H, 2)
        tiles = _tiles(q.shape[2])
        dq = ragged_attention_dq(q, k, v, ctx.segments, stats, dout, ctx.scale, tiles.dq)
        programs = triton.cdiv(len(k), tiles.dkdv.keys) * k.shape[1]
        tile = replace(tiles.dkdv, splits=min(MAX_SPLITS, max(1, ENOUGH_PROGRAMS // max(1, programs))))
        dk, dv = ragged_attention_dkdv(q, k, v, ctx.segments, stats, dout, ctx.scale, tile)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def packed_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, kept: Kept | None = None
) -> Tensor:
    """`packed_attention` of q (Tq, H, D), k and v (Tk, Hk, D): (Tq, H, D). Differentiable in q, k and v."""
    if len(q) == 0:
        return torch.zeros_like(q)
    inputs = (x.contiguous() for x in (q, k, v))
    return _PackedAttention.apply(*inputs, cu_seqlens_q, cu_seqlens_k, scale, kept)
