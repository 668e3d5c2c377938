"""Attention of packed segments on any device that torch knows, in a few large products.

Sizes as in packed_attention.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import without_autocast
from .tiled_attention import (
    Segments,
    TileGroup,
    cut_into_tiles,
    forward_dtype,
    rows_by_head,
    tiles_backward,
    tiles_forward,
)

CHUNK_BYTES = 64 << 20  # copies of a group of tiles
MAX_TILE_ROWS = 8192  # queries times heads: the longest window of 8³ tokens, where 16 heads share a key


def packed_attention_batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`packed_attention_with_lse` in a few large products, where some query has a key.

    `chunk_bytes` bounds the copies that are held at once.
    """
    scale = q.shape[2] ** -0.5 if scale is None else scale
    with without_autocast(q.device):  # what is computed in float32 stays so
        return _PackedAttention.apply(q, k, v, lengths_q, lengths_k, scale, chunk_bytes)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths_q, lengths_k, scale, chunk_bytes):
        rows = rows_by_head(q, k, v, forward_dtype(q))
        groups, slots = _tiles(rows, k.shape[1], lengths_q, lengths_k, chunk_bytes)
        out, lse = tiles_forward(*rows, groups, scale)
        out, lse = out.index_select(0, slots), lse.index_select(0, slots)
        if 0 in lengths_k:
            without = (torch.tensor(lengths_k) == 0).repeat_interleave(torch.tensor(lengths_q)).to(q.device)
            without = without.repeat_interleave(k.shape[1])[:, None]
            out, lse = out.masked_fill_(without, 0.0), lse.masked_fill_(without, -torch.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.scale, ctx.chunk_bytes = (lengths_q, lengths_k), scale, chunk_bytes
        lse = lse.view(q.shape[:2]).float()
        ctx.mark_non_differentiable(lse)
        return out.view(q.shape).to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, out, lse = ctx.saved_tensors
        rows = rows_by_head(q, k, v, torch.promote_types(q.dtype, torch.float32))
        out = out.to(rows[0].dtype)
        dk, dv = torch.zeros_like(rows[1]), torch.zeros_like(rows[2])
        lengths_q, lengths_k = ctx.lengths
        groups, slots = _tiles(rows, k.shape[1], lengths_q, lengths_k, ctx.chunk_bytes)
        dout = dout.to(out.dtype).reshape(out.shape)
        dq = tiles_backward(dout, *rows, out, lse, groups, ctx.scale, dk, dv).index_select(0, slots)
        dq.masked_fill_(lse[:, :1] == -torch.inf, 0.0)  # no key
        return *(d.view(x.shape).to(x.dtype) for d, x in zip((dq, dk, dv), (q, k, v), strict=True)), *[None] * 4


def _tiles(
    rows: tuple[Tensor, Tensor, Tensor], Hk: int, lengths_q: list[int], lengths_k: list[int], chunk_bytes: int
) -> tuple[list[TileGroup], Tensor]:
    """Cut the segments of each head into tiles: see `cut_into_tiles`, but the slots are (Tq Hk,), as the rows of q.

    The slot of a query without a key is 0.
    """
    q, k, _ = rows
    lengths_q, lengths_k = torch.tensor(lengths_q), torch.tensor(lengths_k)
    by_head = torch.arange(len(q), device=q.device).view(-1, Hk).t()  # (Hk, Tq)
    some = lengths_k > 0
    if not some.all():
        by_head = by_head[:, some.repeat_interleave(lengths_q).to(q.device)]
    first_key = Hk * (lengths_k.cumsum(0) - lengths_k) + torch.arange(Hk)[:, None]
    segments = Segments(
        rows=by_head.flatten(),
        lengths=(lengths_q * some).expand(Hk, -1).flatten(),
        first_key=first_key.flatten(),
        num_keys=lengths_k.expand(Hk, -1).flatten(),
        key_stride=Hk,
    )
    groups, slots = cut_into_tiles(segments, q.shape[1], k.shape[1], q.element_size(), chunk_bytes, MAX_TILE_ROWS)
    slot_of_row = torch.zeros(len(q), dtype=torch.long, device=q.device)
    slot_of_row[segments.rows] = slots
    return groups, slot_of_row
