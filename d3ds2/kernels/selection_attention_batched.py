"""Selection attention on any device that torch knows: each query is paired with each block it selected.

The pairs are sorted by block. They attend as the segments of tiled_attention.py, or by torch's FlashAttention where
that runs. The results of a query are then weighted by the softmax denominators of its blocks. The backward pass starts
from the denominator over all its blocks, so nothing of the pairs is kept.

Sizes as in selection_attention.py, and:
    t  tokens of a chunk      P  pairs of a chunk, at most t H S
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import flash_takes, without_autocast
from .tiled_attention import (
    Segments,
    TileGroup,
    cut_into_tiles,
    forward_dtype,
    rows_by_head,
    tiles_backward,
    tiles_forward,
)

CHUNK_BYTES = 128 << 20  # results of pairs that are held at once


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of some tokens with their blocks, sorted by head and block.

    Args:
        queries: rows of the tokens in q (T H, G D).
        rows: row in q of each pair, (P,) long.
        counts: pairs of each head and block, (H M,) long, on the host.
        place: of each pair among `rows`, (t H, S) long; 0 where no block is selected, or an empty one.
        exists: False there, (t H, S).
    """

    queries: slice
    rows: Tensor
    counts: Tensor
    place: Tensor
    exists: Tensor


def selection_attention_batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_offsets: Tensor,
    block_indices: Tensor,
    scale: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`selection_attention` in a few large products; the results of pairs take about `chunk_bytes` at once."""
    apply = _FlashSelection.apply if flash_takes(q) else _TiledSelection.apply
    with without_autocast(q.device):  # what is computed in float32 stays so
        return apply(q, k, v, block_offsets, block_indices, scale, chunk_bytes)


class _TiledSelection(torch.autograd.Function):
    """The pairs attend in padded tiles; sums over the blocks are in at least float32."""

    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale, chunk_bytes):
        (_, H, D), G = k.shape, q.shape[1] // k.shape[1]
        rows = rows_by_head(q, k, v, forward_dtype(q))
        out = torch.zeros_like(rows[0], dtype=torch.promote_types(q.dtype, torch.float32))
        lse = out.new_full((len(out), G), math.inf)
        for pairs in _pairs(block_offsets, block_indices, G * D * out.element_size(), chunk_bytes):
            groups, slots = _tiles(pairs, block_offsets, H, rows, chunk_bytes)
            by_slot = tiles_forward(*rows, groups, scale)
            _merge(*by_slot, slots[pairs.place], pairs, out, lse)
        ctx.save_for_backward(q, k, v, block_offsets, block_indices, out, lse)
        ctx.scale, ctx.chunk_bytes = scale, chunk_bytes
        return out.view(q.shape).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, block_offsets, block_indices, out, lse = ctx.saved_tensors
        H, row_bytes = k.shape[1], out.shape[1] * out.element_size()
        rows = rows_by_head(q, k, v, out.dtype)
        dout = dout.to(out.dtype).reshape(out.shape)
        dq, dk, dv = (torch.zeros_like(x) for x in rows)
        for pairs in _pairs(block_offsets, block_indices, row_bytes, ctx.chunk_bytes):
            groups, slots = _tiles(pairs, block_offsets, H, rows, ctx.chunk_bytes)
            by_slot = tiles_backward(dout, *rows, out, lse, groups, ctx.scale, dk, dv)
            _sum(by_slot, slots[pairs.place], pairs, dq)
        return *(d.view(x.shape).to(x.dtype) for d, x in zip((dq, dk, dv), (q, k, v), strict=True)), *[None] * 4


class _FlashSelection(torch.autograd.Function):
    """The pairs attend by FlashAttention, a segment for each head and block, in half precision."""

    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale, chunk_bytes):
        (T, H, D), G = k.shape, q.shape[1] // k.shape[1]
        queries, keys, values = q.reshape(T * H, G * D), _by_head(k), _by_head(v)
        out = torch.zeros(T * H, G * D, dtype=torch.float32, device=q.device)
        lse = out.new_full((len(out), G), math.inf)
        state = None
        for pairs in _pairs(block_offsets, block_indices, G * D * q.element_size(), chunk_bytes):
            rows = queries.index_select(0, pairs.rows).view(-1, 1, D)
            pair_out, pair_lse, *state = torch.ops.aten._flash_attention_forward(
                rows, keys, values, *_flash_segments(pairs, block_offsets, H, G), 0.0, False, False, scale=scale
            )[:4]
            _merge(pair_out.view(-1, G * D), pair_lse.view(-1, G), pairs.place, pairs, out, lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, block_offsets, block_indices, out, lse)
        ctx.state, ctx.scale, ctx.chunk_bytes = state, scale, chunk_bytes
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, block_offsets, block_indices, out, lse = ctx.saved_tensors
        (T, H, D), G = k.shape, q.shape[1] // k.shape[1]
        queries, keys, values = q.reshape(T * H, G * D), _by_head(k), _by_head(v)
        dout = dout.reshape(T * H, G * D)
        dq = torch.zeros(T * H, G * D, dtype=torch.float32, device=q.device)
        dk, dv = (torch.zeros(keys.shape, dtype=torch.float32, device=q.device) for _ in range(2))
        for pairs in _pairs(block_offsets, block_indices, 4 * G * D * q.element_size(), ctx.chunk_bytes):
            pair_dout, rows, pair_out = (x.index_select(0, pairs.rows).view(-1, 1, D) for x in (dout, queries, out))
            pair_lse = lse.index_select(0, pairs.rows).view(1, -1)
            pair_dq, *gradients = torch.ops.aten._flash_attention_backward(
                pair_dout, rows, keys, values, pair_out, pair_lse, *_flash_segments(pairs, block_offsets, H, G),
                0.0, False, *ctx.state, scale=ctx.scale,
            )  # fmt: skip
            for total, gradient in zip((dk, dv), gradients, strict=True):
                total += gradient
            _sum(pair_dq.view(-1, G * D), pairs.place, pairs, dq)
        dk, dv = (d.view(H, T, D).transpose(0, 1).to(k.dtype) for d in (dk, dv))
        return dq.view(q.shape).to(q.dtype), dk, dv, *[None] * 4


def _by_head(x: Tensor) -> Tensor:
    """(T, H, D) -> (H T, 1, D)."""
    return x.transpose(0, 1).reshape(-1, 1, x.shape[2])


def _pairs(block_offsets: Tensor, block_indices: Tensor, pair_bytes: int, chunk_bytes: int) -> Iterator[Pairs]:
    """The pairs of all tokens, so many tokens at a time that their pairs take about `chunk_bytes`; none is empty."""
    (T, H, S), M = block_indices.shape, block_offsets.numel() - 1
    lengths = torch.nn.functional.pad(block_offsets.diff(), (0, 1))  # block -1 is empty, too
    head = torch.arange(H, device=block_offsets.device)[:, None]
    edges = torch.arange(H * M + 1, device=block_offsets.device)
    step = max(1, chunk_bytes // max(1, H * S * pair_bytes))
    for first in range(0, T, step):
        blocks = block_indices[first : first + step].long()  # (t, H, S)
        exists = lengths[blocks] > 0
        key, order = torch.where(exists, head * M + blocks, H * M).flatten().sort(stable=True)
        ends = torch.searchsorted(key, edges).cpu()
        order, num_pairs = order[: ends[-1]], int(ends[-1])
        if num_pairs:
            place = torch.zeros(exists.numel(), dtype=torch.long, device=order.device)
            place[order] = torch.arange(num_pairs, device=order.device)
            queries = slice(first * H, (first + len(blocks)) * H)
            yield Pairs(queries, order // S + first * H, ends.diff(), place.view(-1, S), exists.reshape(-1, S))


def _tiles(
    pairs: Pairs, block_offsets: Tensor, H: int, rows: tuple[Tensor, Tensor, Tensor], chunk_bytes: int
) -> tuple[list[TileGroup], Tensor]:
    """Cut the pairs into tiles; see `cut_into_tiles`."""
    offsets = block_offsets.long().cpu()
    first_key = H * offsets[:-1] + torch.arange(H)[:, None]  # (H, M)
    lengths = offsets.diff().expand(H, -1).flatten()
    segments = Segments(pairs.rows, pairs.counts, first_key.flatten(), lengths, key_stride=H)
    return cut_into_tiles(segments, rows[0].shape[1], rows[1].shape[1], rows[0].element_size(), chunk_bytes)


def _flash_segments(pairs: Pairs, block_offsets: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, int, int]:
    """First row of queries and of keys of each head and block, (H M + 1,) int32 each, and the longest of both."""
    offsets = block_offsets.long()
    T = offsets[-1:]
    heads = torch.arange(H, device=offsets.device)[:, None]
    keys = torch.cat([(heads * T + offsets[:-1]).flatten(), H * T]).int()
    queries = torch.nn.functional.pad(G * pairs.counts.cumsum(0), (1, 0)).int().to(keys.device)
    return queries, keys, G * int(pairs.counts.max()), int(offsets.diff().max())


def _merge(pair_out: Tensor, pair_lse: Tensor, slots: Tensor, pairs: Pairs, out: Tensor, lse: Tensor) -> None:
    """Weight the results of a query's blocks: slots of the pairs (t H, S) -> its rows of out and lse.

    A query without any block keeps zeros and an lse of +inf, which makes its gradients zero.
    """
    lses = [
        pair_lse.index_select(0, slots[:, s]).masked_fill_(~pairs.exists[:, s, None], -math.inf)
        for s in range(slots.shape[1])
    ]
    total = torch.stack(lses).logsumexp(0)
    total.masked_fill_(total == -math.inf, math.inf)
    lse[pairs.queries] = total
    result = out[pairs.queries].unflatten(1, (total.shape[1], -1))  # (t H, G, D), zeros
    for s, part in enumerate(lses):
        values = pair_out.index_select(0, slots[:, s]).view(result.shape)
        result.addcmul_(values, part.sub_(total).exp_()[..., None])


def _sum(by_slot: Tensor, slots: Tensor, pairs: Pairs, total: Tensor) -> None:
    """Sum over a query's blocks: slots of the pairs (t H, S) -> its rows of total (T H, G D)."""
    for s in range(slots.shape[1]):
        total[pairs.queries].addcmul_(by_slot.index_select(0, slots[:, s]), pairs.exists[:, s, None].to(by_slot.dtype))
