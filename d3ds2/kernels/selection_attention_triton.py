"""Selection attention block by block: a block's keys are read once for many of the queries that selected it.

Every pair of a query row and a block it selected yields a partial result; those of a row are then merged, in the order
of its blocks. Shapes and definition are in selection_attention.py, the kernels of the pairs in
ragged_attention_triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .pair_gradients_triton import pair_dkdv
from .pair_order_triton import MAX_BINS, MAX_PAIRS, order_pairs_triton
from .ragged import AttentionSegments, Ragged
from .ragged_attention_triton import (
    Tile,
    key_norms,
    ragged_attention_dkdv,
    ragged_attention_dq,
    ragged_attention_forward,
)

PARTIAL_BYTES = 1 << 29  # partial results held at once
PARTIAL_BYTES_AT_INFERENCE = 1 << 28  # where weights and latents should fit beside them on a small card
MERGED_ROWS = 64  # rows of tokens times heads that a merging program takes
PAIRS = 1024  # that a program numbers
FORWARD, DQ, DKDV = Tile(128, 32, stages=3, registers=96), Tile(128, 32, stages=3), Tile(64, 64, splits=8)
FORWARD_FP32, DQ_FP32, DKDV_FP32 = Tile(32, 32), Tile(32, 32), Tile(32, 32, splits=4)


@triton.jit
def _merge_kernel(
    partial, partial_lse, block_indices, out, lse, compression, window, gates, gated_out, ROWS, S, HG,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows (token, head, head of the group); softmax over keys from softmaxes over blocks.

    GATED: with the outputs of the other branches, the gated sum of all three. KEEP: out and lse are wanted.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DP)
    valid, is_d = row < ROWS, offs_d < D
    m = tl.full([BLOCK], -1e30, dtype=tl.float32)
    denom = tl.zeros([BLOCK], dtype=tl.float32)
    acc = tl.zeros([BLOCK, DP], dtype=tl.float32)
    for s in range(S):
        pair = row // G * S + s
        real = tl.load(block_indices + pair, mask=valid, other=-1) >= 0
        at = pair * G + row % G
        b_lse = tl.load(partial_lse + at, mask=real, other=float("-inf"))
        b_o = tl.load(partial + at[:, None] * D + offs_d, mask=real[:, None] & is_d, other=0.0).to(tl.float32)
        m_new = tl.maximum(m, b_lse)
        weight, decay = tl.exp2(b_lse - m_new), tl.exp2(m - m_new)
        denom = denom * decay + weight
        acc = acc * decay[:, None] + b_o * weight[:, None]
        m = m_new
    # a query without any block: zeros, and an lse of +inf makes its gradients zero
    has_keys = denom > 0
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


@triton.jit
def _sum_kernel(
    partial, block_indices, first, second, out, ROWS, S, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, HAS_OTHERS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows (token, head, head of the group); sum over the blocks selected and two other parts."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DP)
    valid, is_d = row < ROWS, offs_d < D
    acc = tl.zeros([BLOCK, DP], dtype=tl.float32)
    if HAS_OTHERS:
        here = row[:, None] * D + offs_d
        acc += tl.load(first + here, mask=valid[:, None] & is_d, other=0.0).to(tl.float32)
        acc += tl.load(second + here, mask=valid[:, None] & is_d, other=0.0).to(tl.float32)
    for s in range(S):
        pair = row // G * S + s
        real = tl.load(block_indices + pair, mask=valid, other=-1) >= 0
        at = pair * G + row % G
        acc += tl.load(partial + at[:, None] * D + offs_d, mask=real[:, None] & is_d, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * D + offs_d, acc, mask=valid[:, None] & is_d)


@triton.jit
def _pair_keys_kernel(block_indices, keys, PAIRS, H, S, M, BLOCK: tl.constexpr):
    """One program: head * M + block of BLOCK pairs (query, head, place), H * M of those without a block."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(block_indices + pair, mask=pair < PAIRS, other=-1)
    tl.store(keys + pair, tl.where(block < 0, H * M, pair // S % H * M + block), mask=pair < PAIRS)


def pairs_by_block(block_indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Invert the selection: for each head and block, the pairs (query, place in its list) which selected it.

    Returns `pair_offsets` (H * M + 1,) and `pair_ids` (T * H * S,), both int32. The pairs of head h and block m are
    pair_ids[pair_offsets[h * M + m] : pair_offsets[h * M + m + 1]], ascending, numbered (t * H + h) * S + place; those
    of the -1 stand at the end.
    """
    (_, H, S), pairs = block_indices.shape, block_indices.numel()
    bins = H * num_blocks
    if 0 < bins < MAX_BINS and 0 < pairs <= MAX_PAIRS:
        return order_pairs_triton(block_indices, num_blocks)
    dtype = torch.int16 if bins < 1 << 15 else torch.int32  # radix sort: two passes instead of four
    key = torch.empty(pairs, dtype=dtype, device=block_indices.device)
    if pairs:
        _pair_keys_kernel[(triton.cdiv(pairs, PAIRS),)](block_indices, key, pairs, H, S, num_blocks, BLOCK=PAIRS)
    key, order = key.sort(stable=True)
    edges = torch.arange(bins + 1, dtype=dtype, device=block_indices.device)
    return torch.searchsorted(key, edges, out_int32=True), order.int()


def _chunks(q: Tensor, block_indices: Tensor, partial_bytes: int) -> list[slice]:
    """Slices of the queries whose partial results fit in `partial_bytes`."""
    T, S = len(q), block_indices.shape[2]
    rows = max(1, partial_bytes // max(1, S * q[0].numel() * q.element_size()))
    parts = triton.cdiv(T, rows)
    rows = triton.cdiv(T, parts)  # equal ones
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


def _segments(pair_offsets: Tensor, pair_ids: Tensor, blocks: Ragged, S: int) -> AttentionSegments:
    return AttentionSegments(Ragged(pair_offsets, len(pair_ids), pair_ids), blocks, S)


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
) -> tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None]:
    """Selection attention, and with the other branches the gated sum.

    Args:
        others: outputs of compression and window attention (T, H * G, D) and the gates (T, 3) float32.
        keep: out and lse are wanted; they are for a backward pass.
        norms: `key_norms(k)`, if it is known.

    Returns:
        out (T, H * G, D), base-2 lse (T, H * G) float32, `pairs_by_block` of each chunk of the queries in turn, and
        the gated sum (T, H * G, D).
    """
    D, G, S = k.shape[2], q.shape[1] // k.shape[1], block_indices.shape[2]
    out, lse = (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)) if keep else (None, None)
    gated_out = None if others is None else torch.empty_like(q) if keep else others[0]  # each row is read first
    tile = FORWARD_FP32 if q.dtype == torch.float32 else FORWARD
    pairs, norms = [], key_norms(k) if norms is None else norms
    for chunk in _chunks(q, block_indices, PARTIAL_BYTES if keep else PARTIAL_BYTES_AT_INFERENCE):
        inverted = pairs_by_block(block_indices[chunk], len(blocks))
        segments = _segments(*inverted, blocks, S)
        partial, partial_lse = ragged_attention_forward(q[chunk], k, v, segments, scale, tile, norms)
        kept = partial, partial_lse  # stand-ins, not written
        if out is not None and lse is not None:
            kept = out[chunk], lse[chunk]
        gating = (
            (partial, partial, partial_lse, partial)
            if others is None or gated_out is None
            else (*(x[chunk] for x in others), gated_out[chunk])
        )
        rows = q[chunk].shape[0] * q.shape[1]
        _merge_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
            partial, partial_lse, block_indices[chunk], *kept, *gating, rows, S, q.shape[1],
            G=G, D=D, DP=triton.next_power_of_2(D), BLOCK=MERGED_ROWS, GATED=others is not None, KEEP=keep,
        )  # fmt: skip
        if keep:
            pairs += inverted
    return out, lse, pairs, gated_out


def select_backward(
    q, k, v, blocks: Ragged, block_indices, pairs: list[Tensor], stats, dout, scale: float, others=()
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk and dv in float32, from stats (T, H * G, 2) float32: base-2 lse, and the sums of out * dout.

    `others` are no or two further parts of dq, (T, H * G, D), which are added; the first gets the sum.
    """
    D, G, S = k.shape[2], q.shape[1] // k.shape[1], block_indices.shape[2]
    dq = others[0] if others else torch.empty_like(q)  # each row is read first
    dk = dv = None
    tiles = (DQ_FP32, DKDV_FP32) if q.dtype == torch.float32 else (DQ, DKDV)
    inverted = zip(pairs[::2], pairs[1::2], strict=True)
    for chunk, chunk_pairs in zip(_chunks(q, block_indices, PARTIAL_BYTES), inverted, strict=True):
        segments = _segments(*chunk_pairs, blocks, S)
        inputs = q[chunk], k, v, segments, stats[chunk], dout[chunk], scale
        partial = ragged_attention_dq(*inputs, tiles[0])
        rows = stats[chunk].numel() // 2
        _sum_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
            partial, block_indices[chunk], *([x[chunk] for x in others] or [partial] * 2), dq[chunk], rows, S,
            HAS_OTHERS=bool(others), G=G, D=D, DP=triton.next_power_of_2(D), BLOCK=MERGED_ROWS,
        )  # fmt: skip
        del partial
        of_chunk = (ragged_attention_dkdv if blocks.longest is None else pair_dkdv)(*inputs, tiles[1])
        dk, dv = of_chunk if dk is None or dv is None else (dk.add_(of_chunk[0]), dv.add_(of_chunk[1]))
    return dq, dk, dv


class _SelectionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale):
        ctx.blocks, ctx.scale = Ragged(block_offsets, len(k)), scale
        out, lse, pairs, _ = select_forward(q, k, v, ctx.blocks, block_indices, scale)
        ctx.save_for_backward(q, k, v, block_indices, out, lse, *pairs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, block_indices, out, lse, *pairs = ctx.saved_tensors
        dout = dout.contiguous()
        stats = torch.stack([lse, (out.float() * dout.float()).sum(-1)], dim=-1)  # (T, H * G, 2)
        dq, dk, dv = select_backward(q, k, v, ctx.blocks, block_indices, pairs, stats, dout, ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def selection_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float
) -> Tensor:
    """Same contract as `selection_attention_reference`. Differentiable in q, k and v."""
    if len(q) == 0:
        return torch.zeros_like(q)
    return _SelectionAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), block_offsets, block_indices.contiguous(), scale
    )
