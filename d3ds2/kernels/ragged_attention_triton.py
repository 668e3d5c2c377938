"""Triton kernels of attention between segments; the definition is in ragged_attention.py.

They serve every branch of SSA. A query row is one token in one key/value head, with the G query heads that share it:
`q` is (T, H, G, D). A program takes a tile of one segment. The host bounds the number of tiles, so nothing waits for
the device.

Sizes named in this file:
    T   query tokens        H  key/value heads                       D  channels per head
    Tk  keys                G  query heads per key/value head        S  segments of queries
    P   pairs per query row, or 0; see ragged_attention.py           M  segments of keys
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import Tile
from .devices import abilities
from .ragged import AttentionSegments

LOG2_E = 1.4426950408889634
# Where no score is above `bound`, the softmax weights exp2(score + SHIFT - bound) need no running maximum. In half
# precision they keep their digits if their mean is at least MIN_MEAN_WEIGHT. Bounds above MAX_BOUND are hardly ever so
# close. Scores and bounds are exponents of 2
SHIFT = 15.0
MAX_BOUND = {torch.float16: 28.0, torch.bfloat16: 100.0, torch.float32: 100.0}
MIN_MEAN_WEIGHT = {torch.float16: 2.0**-13, torch.bfloat16: 2.0**-100, torch.float32: 2.0**-100}
NORM_ELEMENTS = 8192  # numbers of the keys whose lengths a program compares


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # fp32 inputs are not rounded to TF32


@triton.jit
def _query_rows(query_ids, offs_i, valid, h, H: tl.constexpr, P: tl.constexpr, HAS_QUERY_IDS: tl.constexpr):
    """Return the rows of q and those of the output, int64, at the places `offs_i` of the list of queries."""
    ids = offs_i.to(tl.int64)
    if HAS_QUERY_IDS:
        ids = tl.load(query_ids + offs_i, mask=valid, other=0).to(tl.int64)
    if P > 0:
        rows = ids // P
        out_rows = ids
    else:
        rows = ids * H + h
        out_rows = rows
    return rows, out_rows


@triton.jit
def _key_rows(key_ids, offs_j, valid, h, H: tl.constexpr, HAS_KEY_IDS: tl.constexpr):
    """Return the rows of k, int64, at the places `offs_j` of the list of keys."""
    ids = offs_j.to(tl.int64)
    if HAS_KEY_IDS:
        ids = tl.load(key_ids + offs_j, mask=valid, other=0).to(tl.int64)
    return ids * H + h


@triton.jit
def _load_keys(
    k, v, key_ids, j, end, h, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_IDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Load keys and values [BLOCK_K, DP] from place j on, zeros from `end` on, which only the TAIL of a segment has."""
    offs_j, offs_d = j + tl.arange(0, BLOCK_K), tl.arange(0, DP)
    is_key = offs_j < end
    at = _key_rows(key_ids, offs_j, is_key, h, H, HAS_KEY_IDS)[:, None] * D + offs_d[None, :]
    mask = (offs_d < D)[None, :]
    if TAIL:
        mask = mask & is_key[:, None]
    b_k, b_v = tl.load(k + at, mask=mask, other=0.0), tl.load(v + at, mask=mask, other=0.0)
    return b_k, b_v


@triton.jit
def _load_stats(stats, at, valid):
    """Load lse and delta of rows together: the threads share one load of both, but would all repeat two loads."""
    return tl.split(tl.load(stats + at[:, None] * 2 + tl.arange(0, 2)[None, :], mask=valid[:, None], other=0.0))


@triton.jit
def _forward_step(
    b_q, k, v, key_ids, j, end, h, m, denom, acc, scale_log2, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_KEY_IDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update the softmax of each row by BLOCK_K keys: its maximum m, its denominator and its numerator acc."""
    b_k, b_v = _load_keys(k, v, key_ids, j, end, h, H, D, DP, BLOCK_K, HAS_KEY_IDS, TAIL)
    b_s = _dot(b_q, tl.trans(b_k))  # [BLOCK_Q * GP, BLOCK_K]
    if TAIL:
        b_s = tl.where((j + tl.arange(0, BLOCK_K) < end)[None, :], b_s, float("-inf"))
    m_new = tl.maximum(m, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - m_new[:, None])
    decay = tl.exp2(m - m_new)
    return m_new, denom * decay + tl.sum(b_p, 1), acc * decay[:, None] + _dot(b_p.to(b_v.dtype), b_v)


@triton.jit
def _bounded_step(
    b_q, k, v, key_ids, j, end, h, m, denom, acc, scale_log2, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_KEY_IDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update denominator and numerator, where m is not the maximum but a close bound of all scores."""
    b_k, b_v = _load_keys(k, v, key_ids, j, end, h, H, D, DP, BLOCK_K, HAS_KEY_IDS, TAIL)
    b_p = tl.exp2(_dot(b_q, tl.trans(b_k)) * scale_log2 - m[:, None])  # [BLOCK_Q * GP, BLOCK_K]
    if TAIL:
        b_p = tl.where((j + tl.arange(0, BLOCK_K) < end)[None, :], b_p, 0.0)
    return denom + tl.sum(b_p, 1), acc + _dot(b_p.to(b_v.dtype), b_v)


@triton.jit
def _dq_step(
    b_q, b_do, b_lse, b_delta, k, v, key_ids, j, end, h, acc, scale_log2, H: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BLOCK_K: tl.constexpr, HAS_KEY_IDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Return acc plus the share of BLOCK_K keys in dq."""
    b_k, b_v = _load_keys(k, v, key_ids, j, end, h, H, D, DP, BLOCK_K, HAS_KEY_IDS, TAIL)
    b_p = tl.exp2(_dot(b_q, tl.trans(b_k)) * scale_log2 - b_lse[:, None])  # [BLOCK_Q * GP, BLOCK_K]
    if TAIL:
        b_p = tl.where((j + tl.arange(0, BLOCK_K) < end)[None, :], b_p, 0.0)  # without a key, exp2(-lse) may overflow
    b_ds = b_p * (_dot(b_do, tl.trans(b_v)) - b_delta[:, None])
    return acc + _dot(b_ds.to(b_k.dtype), b_k)


@triton.jit(do_not_specialize=["S", "M"])
def _forward_kernel(
    q, k, v, tile_offsets, tile_segments, query_offsets, query_ids, key_offsets, key_ids, key_norms, out, lse,
    scale_log2, S, M, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_QUERY_IDS: tl.constexpr, HAS_KEY_IDS: tl.constexpr, MAX_BOUND: tl.constexpr, MIN_MEAN_WEIGHT: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q query rows of one segment, each with its G heads.

    Scores are at most |q| |k|. Where that bound is close enough, no running maximum is needed.
    """
    tile = tl.program_id(0)
    segment = tl.load(tile_segments + tile)
    if segment < S:
        key_segment, h = segment, tl.program_id(1)
        if P > 0:
            key_segment, h = segment % M, segment // M
        first = tl.load(query_offsets + segment) + (tile - tl.load(tile_offsets + segment)) * BLOCK_Q
        offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
        offs_i, g = first + offs // GP, offs % GP
        valid = offs_i < tl.load(query_offsets + segment + 1)
        rows, out_rows = _query_rows(query_ids, offs_i, valid, h, H, P, HAS_QUERY_IDS)
        valid = valid & (g < G)
        is_d = offs_d < D
        b_q = tl.load(q + (rows * G + g)[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)

        start, end = tl.load(key_offsets + key_segment), tl.load(key_offsets + key_segment + 1)
        denom = tl.zeros([BLOCK_Q * GP], dtype=tl.float32)
        acc = tl.zeros([BLOCK_Q * GP, DP], dtype=tl.float32)
        full = start + (end - start) // BLOCK_K * BLOCK_K
        b_square = b_q.to(tl.float32)
        m = tl.sqrt(tl.sum(b_square * b_square, 1)) * tl.load(key_norms + h) * scale_log2
        if tl.max(m, 0) <= MAX_BOUND:
            m -= SHIFT
            for j in range(start, full, BLOCK_K):
                denom, acc = _bounded_step(
                    b_q, k, v, key_ids, j, end, h, m, denom, acc, scale_log2, H, D, DP, BLOCK_K, HAS_KEY_IDS, False
                )
            if full < end:
                denom, acc = _bounded_step(
                    b_q, k, v, key_ids, full, end, h, m, denom, acc, scale_log2, H, D, DP, BLOCK_K, HAS_KEY_IDS, True
                )
        if tl.min(tl.where(valid, denom, float("inf")), 0) < (end - start) * MIN_MEAN_WEIGHT:
            m = tl.full([BLOCK_Q * GP], float("-inf"), dtype=tl.float32)
            denom = tl.zeros([BLOCK_Q * GP], dtype=tl.float32)
            acc = tl.zeros([BLOCK_Q * GP, DP], dtype=tl.float32)
            for j in range(start, full, BLOCK_K):
                m, denom, acc = _forward_step(
                    b_q, k, v, key_ids, j, end, h, m, denom, acc, scale_log2, H, D, DP, BLOCK_K, HAS_KEY_IDS, False
                )
            if full < end:
                m, denom, acc = _forward_step(
                    b_q, k, v, key_ids, full, end, h, m, denom, acc, scale_log2, H, D, DP, BLOCK_K, HAS_KEY_IDS, True
                )

        has_keys = denom > 0  # without keys, the output is zero
        to = out_rows * G + g
        tl.store(out + to[:, None] * D + offs_d, acc / tl.where(has_keys, denom, 1.0)[:, None], valid[:, None] & is_d)
        tl.store(lse + to, tl.where(has_keys, m + tl.log2(denom), float("-inf")), mask=valid)


@triton.jit(do_not_specialize=["Tk"])
def _key_norm_kernel(k, norm_bits, Tk, H, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the length of the longest of BLOCK keys of one head.

    Positive floats have the order of their bits, so an integer maximum merges the programs.
    """
    offs_j, h, offs_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.arange(0, DP)
    at = (offs_j.to(tl.int64) * H + h)[:, None] * D + offs_d
    b_k = tl.load(k + at, mask=(offs_j < Tk)[:, None] & (offs_d < D), other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.max(tl.sum(b_k * b_k, 1), 0))
    tl.atomic_max(norm_bits + h, norm.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["S", "M"])
def _dq_kernel(
    q, k, v, tile_offsets, tile_segments, query_offsets, query_ids, key_offsets, key_ids, stats, dout, dq,
    scale, scale_log2, S, M, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_QUERY_IDS: tl.constexpr, HAS_KEY_IDS: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_Q query rows of one segment, or of BLOCK_Q pairs."""
    tile = tl.program_id(0)
    segment = tl.load(tile_segments + tile)
    if segment < S:
        key_segment, h = segment, tl.program_id(1)
        if P > 0:
            key_segment, h = segment % M, segment // M
        first = tl.load(query_offsets + segment) + (tile - tl.load(tile_offsets + segment)) * BLOCK_Q
        offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
        offs_i, g = first + offs // GP, offs % GP
        valid = offs_i < tl.load(query_offsets + segment + 1)
        rows, out_rows = _query_rows(query_ids, offs_i, valid, h, H, P, HAS_QUERY_IDS)
        valid = valid & (g < G)
        is_d = offs_d < D
        at = rows * G + g
        b_q = tl.load(q + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)
        b_do = tl.load(dout + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)
        b_lse, b_delta = _load_stats(stats, at, valid)

        start, end = tl.load(key_offsets + key_segment), tl.load(key_offsets + key_segment + 1)
        acc = tl.zeros([BLOCK_Q * GP, DP], dtype=tl.float32)
        full = start + (end - start) // BLOCK_K * BLOCK_K
        for j in range(start, full, BLOCK_K):
            acc = _dq_step(
                b_q, b_do, b_lse, b_delta, k, v, key_ids, j, end, h, acc, scale_log2, H, D, DP, BLOCK_K, HAS_KEY_IDS,
                False,
            )  # fmt: skip
        if full < end:
            acc = _dq_step(
                b_q, b_do, b_lse, b_delta, k, v, key_ids, full, end, h, acc, scale_log2, H, D, DP, BLOCK_K,
                HAS_KEY_IDS, True,
            )  # fmt: skip
        tl.store(dq + (out_rows * G + g)[:, None] * D + offs_d, acc * scale, mask=valid[:, None] & is_d)


@triton.jit(do_not_specialize=["M"])
def _dkdv_kernel(
    q, k, v, tile_offsets, tile_segments, query_offsets, query_ids, key_offsets, key_ids, stats, dout, dk, dv,
    scale, scale_log2, M, SIZE, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_QUERY_IDS: tl.constexpr, HAS_KEY_IDS: tl.constexpr, HAS_PARTS: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_K keys of one segment and head, over its query rows.

    With HAS_PARTS, it takes one part of the rows; dk and dv hold the partial sums of all parts, SIZE numbers apart.
    """
    tile, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_segment = tl.load(tile_segments + tile)
    if key_segment < M:
        segment = key_segment
        if P > 0:
            segment = h * M + key_segment
        start = tl.load(key_offsets + key_segment) + (tile - tl.load(tile_offsets + key_segment)) * BLOCK_K
        offs_j = start + tl.arange(0, BLOCK_K)
        offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
        is_key, is_d = offs_j < tl.load(key_offsets + key_segment + 1), offs_d < D
        kv = _key_rows(key_ids, offs_j, is_key, h, H, HAS_KEY_IDS)[:, None] * D + offs_d
        b_k = tl.load(k + kv, mask=is_key[:, None] & is_d, other=0.0)  # [BLOCK_K, DP]
        b_v = tl.load(v + kv, mask=is_key[:, None] & is_d, other=0.0)
        b_dk = tl.zeros([BLOCK_K, DP], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_K, DP], dtype=tl.float32)

        first, last = tl.load(query_offsets + segment), tl.load(query_offsets + segment + 1)
        if HAS_PARTS:
            part = tl.cdiv(tl.cdiv(last - first, tl.num_programs(2)), BLOCK_Q) * BLOCK_Q
            first = first + split * part
            last = tl.minimum(last, first + part)
        for i in range(first, last, BLOCK_Q):
            offs_i, g = i + offs // GP, offs % GP
            valid = offs_i < last
            rows, _out_rows = _query_rows(query_ids, offs_i, valid, h, H, P, HAS_QUERY_IDS)
            valid = valid & (g < G)
            at = rows * G + g
            b_q = tl.load(q + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)  # [BLOCK_Q * GP, DP]
            b_do = tl.load(dout + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)
            b_lse, b_delta = _load_stats(stats, at, valid)  # without a query, q, dout and delta are zero
            # [BLOCK_K, BLOCK_Q * GP]; a row without a key may hold anything: it reaches only a row that is not stored
            b_p = tl.exp2(_dot(b_k, tl.trans(b_q)) * scale_log2 - b_lse)
            b_ds = b_p * (_dot(b_v, tl.trans(b_do)) - b_delta)
            b_dv += _dot(b_p.to(b_do.dtype), b_do)
            b_dk += _dot(b_ds.to(b_q.dtype), b_q)
        to = kv + split.to(tl.int64) * SIZE
        tl.store(dk + to, b_dk * scale, mask=is_key[:, None] & is_d)
        tl.store(dv + to, b_dv, mask=is_key[:, None] & is_d)


def kernel_arguments(q: Tensor, k: Tensor, segments: AttentionSegments, tile: Tile) -> tuple[tuple, dict]:
    """Return the lists of rows as the kernels take them, and the sizes, for q (T, H * G, D) and k (Tk, H, D).

    Where ids are None, the offsets are passed instead, and the kernels never read them. The pipeline gets only as many
    stages as fit into shared memory.
    """
    H, D = k.shape[1:]
    G = q.shape[1] // H
    GP, DP = triton.next_power_of_2(G), max(16, triton.next_power_of_2(D))
    card, numbers = abilities(q.device), 2 * DP * max(tile.rows, tile.keys)  # of two tensors, loaded by each step
    others = DP * (tile.rows + tile.keys) + tile.rows * tile.keys
    stages = card.stages(tile.stages, numbers * q.element_size(), others * q.element_size())
    queries, keys = segments.queries, segments.keys
    lists = tuple(x for rows in (queries, keys) for x in (rows.offsets, rows.offsets if rows.ids is None else rows.ids))
    return lists, {
        "H": H, "G": G, "D": D, "P": segments.pairs, "GP": GP, "DP": DP,
        "BLOCK_Q": max(1, tile.rows // GP), "BLOCK_K": tile.keys,
        "HAS_QUERY_IDS": queries.ids is not None, "HAS_KEY_IDS": keys.ids is not None,
        "num_warps": tile.warps, "num_stages": stages,
        **({"maxnreg": tile.registers} if tile.registers is not None and card.limits_registers else {}),
    }  # fmt: skip


def key_norms(k: Tensor) -> Tensor:
    """Return the length of the longest key of each head, (H,) float32, for k (Tk, H, D)."""
    (Tk, H, D), DP = k.shape, triton.next_power_of_2(k.shape[2])
    norms = k.new_zeros(H, dtype=torch.float32)
    if Tk:
        BLOCK = max(1, NORM_ELEMENTS // DP)
        _key_norm_kernel[triton.cdiv(Tk, BLOCK), H](k, norms.view(torch.int32), Tk, H, D=D, DP=DP, BLOCK=BLOCK)
    return norms


def ragged_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: AttentionSegments, scale: float, tile: Tile, norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return out (T, H * G, D) and lse (T, H * G) float32, in base 2, as `ragged_attention_reference` does.

    With pairs they are (T * H * P, G, D) and (T * H * P, G). Rows that lie in no segment are not written.

    Args:
        q: queries (T, H * G, D); all inputs are contiguous.
        k, v: keys and values (Tk, H, D).
        segments: which of them attention pairs.
        scale: factor on the scores.
        tile: how the kernel cuts its work.
        norms: `key_norms(k)`, where it is known.
    """
    lists, sizes = kernel_arguments(q, k, segments, tile)
    shape = (len(q) * sizes["H"] * segments.pairs, sizes["G"]) if segments.pairs else q.shape[:2]
    out, lse = q.new_empty(*shape, q.shape[2]), q.new_empty(shape, dtype=torch.float32)
    tiles = segments.queries.tiles(sizes["BLOCK_Q"])
    if len(tiles[1]):
        _forward_kernel[len(tiles[1]), 1 if segments.pairs else sizes["H"]](
            q, k, v, *tiles, *lists, key_norms(k) if norms is None else norms, out, lse, scale * LOG2_E,
            len(segments.queries), len(segments.keys), **sizes, MAX_BOUND=MAX_BOUND[q.dtype],
            MIN_MEAN_WEIGHT=MIN_MEAN_WEIGHT[q.dtype], SHIFT=SHIFT,
        )  # fmt: skip
    return out, lse


def ragged_attention_dq(
    q: Tensor, k: Tensor, v: Tensor, segments: AttentionSegments, stats: Tensor, dout: Tensor, scale: float, tile: Tile,
) -> Tensor:  # fmt: skip
    """Return dq (T, H * G, D), or with pairs the part of it from each pair (T * H * P, G, D).

    Args:
        q, k, v, segments, scale, tile: as in `ragged_attention_forward`.
        stats: lse in base 2, and delta, the sum of out * dout over D, of each row: (T, H * G, 2) float32. With pairs, a
            row has one softmax over all its pairs.
        dout: gradient of out, (T, H * G, D). It may lack a positive factor for each row, if log2 of the factor is
            subtracted from lse, and delta lacks the factor too.
    """
    lists, sizes = kernel_arguments(q, k, segments, tile)
    pairs = len(q) * sizes["H"] * segments.pairs
    dq = q.new_empty((pairs, sizes["G"], q.shape[2]) if segments.pairs else q.shape)
    tiles = segments.queries.tiles(sizes["BLOCK_Q"])
    if len(tiles[1]):
        _dq_kernel[len(tiles[1]), 1 if segments.pairs else sizes["H"]](
            q, k, v, *tiles, *lists, stats, dout, dq, scale, scale * LOG2_E,
            len(segments.queries), len(segments.keys), **sizes,
        )  # fmt: skip
    return dq


def ragged_attention_dkdv(
    q: Tensor, k: Tensor, v: Tensor, segments: AttentionSegments, stats: Tensor, dout: Tensor, scale: float, tile: Tile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk and dv (Tk, H, D) float32, sums of `tile.splits` parts in a fixed order.

    Every key must lie in exactly one segment. The arguments are those of `ragged_attention_dq`.
    """
    lists, sizes = kernel_arguments(q, k, segments, tile)
    dk, dv = (k.new_empty(tile.splits, *k.shape, dtype=torch.float32) for _ in range(2))
    tiles = segments.keys.tiles(tile.keys)
    if len(tiles[1]):
        _dkdv_kernel[len(tiles[1]), sizes["H"], tile.splits](
            q, k, v, *tiles, *lists, stats, dout, dk, dv, scale, scale * LOG2_E,
            len(segments.keys), k.numel(), **sizes, HAS_PARTS=tile.splits > 1,
        )  # fmt: skip
    return (dk[0], dv[0]) if tile.splits == 1 else (dk.sum(0), dv.sum(0))
