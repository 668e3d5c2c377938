"""Triton kernels of dk and dv for blocks that many queries may select; the definition is in pair_gradients.py.

One program for a block that most queries selected would still run long after all others. Here a program takes one chunk
of a block's pairs. A block with several chunks gets a partial sum from each; they are then added in a fixed order. The
number of chunks is bounded by the number of pairs, not by the number of blocks.

Sizes are named in ragged_attention_triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import Tile
from .ragged import AttentionSegments
from .ragged_attention_triton import LOG2_E, _dot, _load_stats, kernel_arguments

CHUNK_PAIRS = 512  # that a program takes


@triton.jit(do_not_specialize=["S", "M", "LONGEST"])
def _dkdv_chunk_kernel(
    q, k, v, chunk_offsets, chunk_segments, slots, query_offsets, query_ids, key_offsets, stats, dout, dk, dv,
    partial_dk, partial_dv, scale, scale_log2, S, M, LONGEST, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_K keys of one segment, from one chunk of its CHUNK pairs.

    They are the result if the segment has no other chunk. Otherwise they are partial sums, in slots of LONGEST keys.
    """
    chunk = tl.program_id(0)
    segment = tl.load(chunk_segments + chunk)
    if segment < S:
        key_segment, h = segment % M, segment // M
        start = tl.load(key_offsets + key_segment)
        size = tl.load(key_offsets + key_segment + 1) - start
        place = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # in the segment
        if tl.program_id(1) * BLOCK_K < size:
            offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
            is_key, is_d = place < size, offs_d < D
            kv = ((start + place).to(tl.int64) * H + h)[:, None] * D + offs_d
            b_k = tl.load(k + kv, mask=is_key[:, None] & is_d, other=0.0)  # [BLOCK_K, DP]
            b_v = tl.load(v + kv, mask=is_key[:, None] & is_d, other=0.0)
            b_dk = tl.zeros([BLOCK_K, DP], dtype=tl.float32)
            b_dv = tl.zeros([BLOCK_K, DP], dtype=tl.float32)
            number = chunk - tl.load(chunk_offsets + segment)
            first = tl.load(query_offsets + segment) + number * CHUNK
            last = tl.minimum(first + CHUNK, tl.load(query_offsets + segment + 1))
            for i in range(first, last, BLOCK_Q):
                offs_i, g = i + offs // GP, offs % GP
                valid = offs_i < last
                at = tl.load(query_ids + offs_i, mask=valid, other=0).to(tl.int64) // P * G + g
                valid = valid & (g < G)
                b_q = tl.load(q + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)
                b_do = tl.load(dout + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)
                b_lse, b_delta = _load_stats(stats, at, valid)  # where no query is, q, dout and delta are zero
                b_p = tl.exp2(_dot(b_k, tl.trans(b_q)) * scale_log2 - b_lse)  # [BLOCK_K, BLOCK_Q * GP]
                b_ds = b_p * (_dot(b_v, tl.trans(b_do)) - b_delta)
                b_dv += _dot(b_p.to(b_do.dtype), b_do)
                b_dk += _dot(b_ds.to(b_q.dtype), b_q)
            slot = tl.load(slots + segment)
            if tl.load(slots + segment + 1) == slot:  # the segment has only this chunk
                tl.store(dk + kv, b_dk * scale, mask=is_key[:, None] & is_d)
                tl.store(dv + kv, b_dv, mask=is_key[:, None] & is_d)
            else:
                to = ((slot + number).to(tl.int64) * LONGEST + place)[:, None] * D + offs_d
                tl.store(partial_dk + to, b_dk * scale, mask=is_key[:, None] & is_d)
                tl.store(partial_dv + to, b_dv, mask=is_key[:, None] & is_d)


@triton.jit(do_not_specialize=["M", "LONGEST"])
def _add_chunks_kernel(
    partial_dk, partial_dv, chunk_offsets, slots, tile_offsets, tile_segments, key_offsets, dk, dv, M, LONGEST,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_K keys of one segment and head, unless its pairs fill just one chunk."""
    tile, h = tl.program_id(0), tl.program_id(1)
    key_segment = tl.load(tile_segments + tile)
    if key_segment < M:
        segment = h * M + key_segment
        chunks = tl.load(chunk_offsets + segment + 1) - tl.load(chunk_offsets + segment)
        if chunks != 1:
            offs_d = tl.arange(0, DP)
            start = tl.load(key_offsets + key_segment)
            place = (tile - tl.load(tile_offsets + key_segment)) * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = (start + place < tl.load(key_offsets + key_segment + 1))[:, None] & (offs_d < D)
            b_dk = tl.zeros([BLOCK_K, DP], dtype=tl.float32)
            b_dv = tl.zeros([BLOCK_K, DP], dtype=tl.float32)
            slot = tl.load(slots + segment).to(tl.int64)
            for i in range(chunks):
                at = ((slot + i) * LONGEST + place)[:, None] * D + offs_d
                b_dk += tl.load(partial_dk + at, mask=mask, other=0.0)
                b_dv += tl.load(partial_dv + at, mask=mask, other=0.0)
            kv = ((start + place).to(tl.int64) * H + h)[:, None] * D + offs_d
            tl.store(dk + kv, b_dk, mask=mask)
            tl.store(dv + kv, b_dv, mask=mask)


def pair_dkdv(
    q: Tensor, k: Tensor, v: Tensor, segments: AttentionSegments, stats: Tensor, dout: Tensor, scale: float,
    tile: Tile, chunk: int = CHUNK_PAIRS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk and dv (Tk, H, D) float32, as `pair_dkdv_reference` does.

    Args:
        q: queries (T, H * G, D).
        k, v: keys and values (Tk, H, D).
        segments: H * M segments of pairs and M segments of keys, without ids, whose `longest` is known.
        stats: lse in base 2, and the sum of out * dout over D, of each row of q: (T, H * G, 2) float32.
        dout: gradient of the output (T, H * G, D).
        scale: factor on the scores.
        tile: how the kernels cut their work.
        chunk: pairs of a chunk.
    """
    (query_offsets, query_ids, key_offsets, _), sizes = kernel_arguments(q, k, segments, tile)
    for name in ("HAS_QUERY_IDS", "HAS_KEY_IDS"):
        del sizes[name]
    keys, H, D = segments.keys, k.shape[1], k.shape[2]
    chunk_offsets, chunk_segments = segments.queries.tiles(chunk)
    chunks = chunk_offsets.diff()
    slots = torch.nn.functional.pad(torch.where(chunks > 1, chunks, 0).cumsum(0), (1, 0)).int()
    capacity = 2 * segments.queries.total // chunk + 1  # a segment of n > chunk pairs has at most 2 n / chunk chunks
    dk, dv = (k.new_empty(k.shape, dtype=torch.float32) for _ in range(2))
    partial_dk, partial_dv = k.new_empty(2, capacity, keys.longest, D, dtype=torch.float32)
    _dkdv_chunk_kernel[len(chunk_segments), triton.cdiv(keys.longest, tile.keys)](
        q, k, v, chunk_offsets, chunk_segments, slots, query_offsets, query_ids, key_offsets, stats, dout, dk, dv,
        partial_dk, partial_dv, scale, scale * LOG2_E, len(segments.queries), len(keys), keys.longest,
        **sizes, CHUNK=chunk,
    )  # fmt: skip
    tile_offsets, tile_segments = keys.tiles(tile.keys)
    _add_chunks_kernel[len(tile_segments), H](
        partial_dk, partial_dv, chunk_offsets, slots, tile_offsets, tile_segments, key_offsets, dk, dv,
        len(keys), keys.longest, H=H, D=D, DP=sizes["DP"], BLOCK_K=tile.keys,
    )  # fmt: skip
    return dk, dv
