"""Selection attention from block to block, in Triton; shapes and definition are in selection_attention.py.

A program reads a block's keys once and uses them for many of the queries that selected the block. Each pair of a query
row and a block yields a partial result; those of a row are then merged, in the order of its blocks. The kernels of the
pairs are in ragged_attention_triton.py. In the kernels, HG is the number of query heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_stats_triton import attention_stats
from .attention_tiles import AttentionTiles, Tile
from .pair_gradients_triton import pair_dkdv
from .pair_order_triton import pairs_by_block_triton
from .ragged import AttentionSegments, Ragged
from .ragged_attention_triton import (
    key_norms,
    ragged_attention_dkdv,
    ragged_attention_dq,
    ragged_attention_forward,
)

HALF = AttentionTiles(
    forward=Tile(128, 32, stages=3, registers=96), dq=Tile(128, 32, stages=3), dkdv=Tile(64, 64, splits=8)
)
FP32 = AttentionTiles(forward=Tile(32, 32), dq=Tile(32, 32), dkdv=Tile(32, 32, splits=4))
MERGED_ROWS = 64  # (token, query head), that a merging program takes

PARTIAL_BYTES = 1 << 29  # partial results held at once
INFERENCE_PARTIAL_BYTES = 1 << 28  # fewer, so that they fit on a small card beside weights and latents


@triton.jit(do_not_specialize=["ROWS"])
def _merge_kernel(
    partial, partial_lse, block_indices, out, lse, compression, window, gates, gated_out, ROWS, K, HG,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program: the softmax over all keys of BLOCK rows (token, query head), from those over single blocks.

    KEEP: store out and lse. GATED: store the gated sum of this and the two other branches.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DP)
    valid, is_d = row < ROWS, offs_d < D
    m = tl.full([BLOCK], -1e30, dtype=tl.float32)
    denom = tl.zeros([BLOCK], dtype=tl.float32)
    acc = tl.zeros([BLOCK, DP], dtype=tl.float32)
    for i in range(K):
        pair = row // G * K + i
        real = tl.load(block_indices + pair, mask=valid, other=-1) >= 0
        at = pair * G + row % G
        b_lse = tl.load(partial_lse + at, mask=real, other=float("-inf"))
        b_o = tl.load(partial + at[:, None] * D + offs_d, mask=real[:, None] & is_d, other=0.0).to(tl.float32)
        m_new = tl.maximum(m, b_lse)
        weight, decay = tl.exp2(b_lse - m_new), tl.exp2(m - m_new)
        denom = denom * decay + weight
        acc = acc * decay[:, None] + b_o * weight[:, None]
        m = m_new
    has_keys = denom > 0  # without any block, the output is 0, and an lse of +inf makes the gradients 0
    acc = acc / tl.where(has_keys, denom, 1.0)[:, None]
    here, mask = row[:, None] * D + offs_d, valid[:, None] & is_d
    if KEEP:
        tl.store(out + here, acc, mask=mask)
        tl.store(lse + row, tl.where(has_keys, m + tl.log2(denom), float("inf")), mask=valid)
    if GATED:
        gate = gates + row // HG * 3
        acc = acc * tl.load(gate + 1, mask=valid, other=0.0)[:, None]
        b_o = tl.load(compression + here, mask=mask, other=0.0).to(tl.float32)
        acc += b_o * tl.load(gate, mask=valid, other=0.0)[:, None]
        b_o = tl.load(window + here, mask=mask, other=0.0).to(tl.float32)
        acc += b_o * tl.load(gate + 2, mask=valid, other=0.0)[:, None]
        tl.store(gated_out + here, acc, mask=mask)


@triton.jit(do_not_specialize=["ROWS"])
def _sum_kernel(
    partial, block_indices, first, second, out, ROWS, K, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, HAS_OTHERS: tl.constexpr,
):  # fmt: skip
    """One program: the sum of the parts of BLOCK rows (token, query head): one per selected block, and two others."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DP)
    valid, is_d = row < ROWS, offs_d < D
    acc = tl.zeros([BLOCK, DP], dtype=tl.float32)
    if HAS_OTHERS:
        here = row[:, None] * D + offs_d
        acc += tl.load(first + here, mask=valid[:, None] & is_d, other=0.0).to(tl.float32)
        acc += tl.load(second + here, mask=valid[:, None] & is_d, other=0.0).to(tl.float32)
    for i in range(K):
        pair = row // G * K + i
        real = tl.load(block_indices + pair, mask=valid, other=-1) >= 0
        at = pair * G + row % G
        acc += tl.load(partial + at[:, None] * D + offs_d, mask=real[:, None] & is_d, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * D + offs_d, acc, mask=valid[:, None] & is_d)


def _query_chunks(q: Tensor, block_indices: Tensor, partial_bytes: int) -> list[slice]:
    """Cut the queries into equal slices whose partial results fit in `partial_bytes`."""
    T, K = len(q), block_indices.shape[2]
    rows = max(1, partial_bytes // max(1, K * q[0].numel() * q.element_size()))
    rows = triton.cdiv(T, triton.cdiv(T, rows))
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


def _segments(pair_offsets: Tensor, pair_ids: Tensor, blocks: Ragged, K: int) -> AttentionSegments:
    return AttentionSegments(Ragged(pair_offsets, len(pair_ids), pair_ids), blocks, K)


class Selected(NamedTuple):
    """The results of `select_forward`."""

    out: Tensor | None  # (T, H, D), None unless kept
    lse: Tensor | None  # in base 2, (T, H) float32, None unless kept
    pairs: list[Tensor]  # `pair_offsets` and `pair_ids` of each chunk of queries in turn, empty unless kept
    gated_out: Tensor | None  # the gated sum of the three branches (T, H, D), None without the other branches


def select_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Ragged,
    block_indices: Tensor,
    scale: float,
    others: tuple[Tensor, Tensor, Tensor] | None = None,
    keep: bool = True,
    norms: Tensor | None = None,
) -> Selected:
    """Return selection attention, and with the other branches the gated sum.

    Args:
        q: queries (T, H, D); all inputs are contiguous.
        k, v: keys and values (T, Hk, D), sorted by block.
        blocks: tokens of each block.
        block_indices: global ids of the selected blocks (T, Hk, K) int32; -1 is none.
        scale: factor on the scores.
        others: outputs of compression and window attention (T, H, D), and the gates (T, 3) float32. Unless `keep`, the
            gated sum overwrites the first.
        keep: return what the backward pass needs: out, lse and pairs.
        norms: `key_norms(k)`, where it is known.
    """
    D, G, K = k.shape[2], q.shape[1] // k.shape[1], block_indices.shape[2]
    out = torch.empty_like(q) if keep else None
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if keep else None
    gated_out = None if others is None else torch.empty_like(q) if keep else others[0]  # a row is read, then written
    tiles = FP32 if q.dtype == torch.float32 else HALF
    pairs, norms = [], key_norms(k) if norms is None else norms
    for chunk in _query_chunks(q, block_indices, PARTIAL_BYTES if keep else INFERENCE_PARTIAL_BYTES):
        chunk_pairs = pairs_by_block_triton(block_indices[chunk], len(blocks))
        segments = _segments(*chunk_pairs, blocks, K)
        partial, partial_lse = ragged_attention_forward(q[chunk], k, v, segments, scale, tiles.forward, norms)
        kept = partial, partial_lse  # stand for tensors that the kernel leaves alone
        if out is not None and lse is not None:
            kept = out[chunk], lse[chunk]
        gating = partial, partial, partial_lse, partial  # likewise
        if others is not None and gated_out is not None:
            gating = *(x[chunk] for x in others), gated_out[chunk]
        rows = len(q[chunk]) * q.shape[1]
        _merge_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
            partial, partial_lse, block_indices[chunk], *kept, *gating, rows, K, q.shape[1],
            G=G, D=D, DP=triton.next_power_of_2(D), BLOCK=MERGED_ROWS, GATED=others is not None, KEEP=keep,
        )  # fmt: skip
        if keep:
            pairs += chunk_pairs
    return Selected(out, lse, pairs, gated_out)


def select_backward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Ragged, block_indices: Tensor, pairs: list[Tensor], stats: Tensor,
    dout: Tensor, scale: float, others: tuple[()] | tuple[Tensor, Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q (T, H, D), and of k and v (T, Hk, D) float32.

    Args:
        q, k, v, blocks, block_indices, scale: as in `select_forward`.
        pairs: from `select_forward`.
        stats: lse in base 2, and the sum of out * dout over D: (T, H, 2) float32. `ragged_attention_dq` says how a
            factor on dout goes into lse.
        dout: gradient of the output (T, H, D).
        others: two more parts of dq (T, H, D), which are added to it. The sum overwrites the first.
    """
    D, G, K = k.shape[2], q.shape[1] // k.shape[1], block_indices.shape[2]
    dq = others[0] if others else torch.empty_like(q)  # a row is read, then written
    dk = dv = None
    tiles = FP32 if q.dtype == torch.float32 else HALF
    pair_offsets, pair_ids = pairs[::2], pairs[1::2]  # of each chunk
    chunks = _query_chunks(q, block_indices, PARTIAL_BYTES)
    for chunk, offsets, ids in zip(chunks, pair_offsets, pair_ids, strict=True):
        segments = _segments(offsets, ids, blocks, K)
        inputs = q[chunk], k, v, segments, stats[chunk], dout[chunk], scale
        partial = ragged_attention_dq(*inputs, tiles.dq)
        rows = len(q[chunk]) * q.shape[1]
        first, second = (x[chunk] for x in others) if others else (partial, partial)  # not read without others
        _sum_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
            partial, block_indices[chunk], first, second, dq[chunk], rows, K,
            HAS_OTHERS=bool(others), G=G, D=D, DP=triton.next_power_of_2(D), BLOCK=MERGED_ROWS,
        )  # fmt: skip
        del partial, first, second
        gradients_of_keys = ragged_attention_dkdv if blocks.longest is None else pair_dkdv
        chunk_dk, chunk_dv = gradients_of_keys(*inputs, tiles.dkdv)
        dk, dv = (chunk_dk, chunk_dv) if dk is None or dv is None else (dk.add_(chunk_dk), dv.add_(chunk_dv))
    return dq, dk, dv


class _SelectionAttention(torch.autograd.Function):
    """`select_forward` and `select_backward` of one branch alone."""

    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale):
        ctx.blocks, ctx.scale = Ragged(block_offsets, len(k)), scale
        selected = select_forward(q, k, v, ctx.blocks, block_indices, scale)
        ctx.save_for_backward(q, k, v, block_indices, selected.out, selected.lse, *selected.pairs)
        return selected.out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, block_indices, out, lse, *pairs = ctx.saved_tensors
        dout = dout.contiguous()
        stats = attention_stats(lse, out, dout)  # (T, H, 2)
        dq, dk, dv = select_backward(q, k, v, ctx.blocks, block_indices, pairs, stats, dout, ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def selection_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float
) -> Tensor:
    """Return what `selection_attention_reference` does, (T, H, D), differentiable in q, k and v."""
    if len(q) == 0:
        return torch.zeros_like(q)
    return _SelectionAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), block_offsets, block_indices.contiguous(), scale
    )
