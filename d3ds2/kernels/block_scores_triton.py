"""Triton kernel of the choice of blocks; shapes and definition are in block_scores.py.

A program takes a few queries with all heads of a group. It writes the scores of the blocks of the sample, each block's
probabilities summed over its compressed keys and the heads, into a scratch row per query, and finds there the K-th
best. The scratch belongs to the programs that run at once, not to the tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ragged import AttentionPlan
from .ragged_attention_triton import LOG2_E

LANES = 128  # scores of a query beside each other
BOUND_STEPS = 16  # of a bisection that yields a close lower bound


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts its work: query heads and blocks at a time, queries ranked at once, warps, stages, programs
    per multiprocessor.
    """

    rows: int = 64
    blocks: int = 32
    ranked: int = 1
    warps: int = 1
    stages: int = 2
    programs: int = 12


HALF, SEVERAL, FP32 = Tile(programs=28), Tile(programs=32), Tile(warps=4, programs=4)  # SEVERAL keys a block


@triton.jit
def _head_sums(
    b_q, b_lse, keys, rows, there, h, scale_log2, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Probabilities of the compressed keys in `rows`, summed over the heads: [BLOCK_B, BLOCK_Q]."""
    offs_d = tl.arange(0, DP)
    mask = there[:, None] & (offs_d < D)[None, :]
    b_k = tl.load(keys + (rows.to(tl.int64) * H + h)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - b_lse[None, :])
    if INTERLEAVED:
        b_p = tl.reshape(b_p, [BLOCK_B, BLOCK_Q // 4, GP // 2, 4, 2])
        return tl.reshape(tl.sum(tl.sum(b_p, 4), 2), [BLOCK_B, BLOCK_Q])
    else:
        return tl.sum(tl.reshape(b_p, [BLOCK_B, BLOCK_Q, GP]), 2)


@triton.jit
def _count(row, low, blocks, RANKED: tl.constexpr, LANES: tl.constexpr):
    """How many scores in each row of the scratch are, as bits, at least `low`: [RANKED]."""
    count = tl.zeros([RANKED], dtype=tl.int32)
    for start in range(0, blocks, LANES):
        block = start + tl.arange(0, LANES)[None, :]
        bits = tl.load(row + block, mask=block < blocks, other=-1.0).to(tl.int32, bitcast=True)
        count += tl.sum((bits >= low[:, None]).to(tl.int32), 1)
    return count


@triton.jit
def _select_kernel(
    q, keys, lse, block_key_offsets, block_order, tile_offsets, tile_samples, query_offsets, sample_blocks,
    block_indices, scratch, scale_log2, B, num_tiles, STRIDE, K, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr, RANKED: tl.constexpr, HAS_ORDER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program: every so many tiles of BLOCK_Q queries and one key head. The keys stand in the order of blocks."""
    offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
    if INTERLEAVED:  # the heads of a query are columns that one thread holds: their sum takes no exchange
        in_tile, g = offs // (4 * GP) * 4 + offs % 8 // 2, offs % (4 * GP) // 8 * 2 + offs % 2
    else:
        in_tile, g = offs // GP, offs % GP
    rows_of_scratch = scratch + (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64) * STRIDE
    for work in range(tl.program_id(0), num_tiles * H, tl.num_programs(0)):
        tile, h = work // H, work % H
        # Spare tiles have sample B. They count as tiles of the last sample, where they begin after its last query. An
        # `if` around the rest would be shorter, but Triton 3.1 to 3.3 allow none here that contains a call
        sample = tl.minimum(tl.load(tile_samples + tile), B - 1)
        first = tl.load(query_offsets + sample) + (tile - tl.load(tile_offsets + sample)) * BLOCK_Q
        last = tl.load(query_offsets + sample + 1)
        queries = tl.minimum(last - first, BLOCK_Q)  # none in a spare tile
        first_block = tl.load(sample_blocks + sample)
        blocks = tl.where(queries > 0, tl.load(sample_blocks + sample + 1) - first_block, 0)
        t = first + in_tile
        valid = (t < last) & (g < G)
        at = (t.to(tl.int64) * H + h) * G + g
        mask = valid[:, None] & (offs_d < D)[None, :]
        b_q = tl.load(q + at[:, None] * D + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_Q * GP, DP]
        b_lse = tl.load(lse + at, mask=valid, other=float("inf"))  # no head: no probability

        for start in range(0, blocks, BLOCK_B):
            block = start + tl.arange(0, BLOCK_B)
            real = block < blocks
            if HAS_ORDER:  # several keys a block: first the blocks with most, so that a tile has about as many
                block = tl.load(block_order + first_block + block, mask=real, other=0) - first_block
                key = tl.load(block_key_offsets + first_block + block, mask=real, other=0)
                children = tl.load(block_key_offsets + first_block + block + 1, mask=real, other=0) - key
                b_score = tl.zeros([BLOCK_B, BLOCK_Q], dtype=tl.float32)
                for i in range(tl.max(children, 0)):
                    b_sum = _head_sums(
                        b_q, b_lse, keys, key + i, i < children, h, scale_log2, H, D, DP, GP, BLOCK_Q, BLOCK_B,
                        INTERLEAVED,
                    )  # fmt: skip
                    b_score += tl.where((i < children)[:, None], b_sum, 0.0)
            else:
                b_score = _head_sums(
                    b_q, b_lse, keys, first_block + block, real, h, scale_log2, H, D, DP, GP, BLOCK_Q, BLOCK_B,
                    INTERLEAVED,
                )  # fmt: skip
            tl.store(rows_of_scratch[None, :] + block[:, None], b_score, mask=real[:, None])
        tl.debug_barrier()  # the scratch is written by other threads than read it

        for sub in range(0, queries, RANKED):
            offs_s = sub + tl.arange(0, RANKED)
            row = scratch + (tl.program_id(0) * BLOCK_Q + offs_s).to(tl.int64)[:, None] * STRIDE  # [RANKED, 1]
            # bits of positive floats stand in their order. The K-th best of LANES maxima is a lower bound
            best = tl.full([RANKED, LANES], -1, dtype=tl.int32)
            for start in range(0, blocks, LANES):
                block = start + tl.arange(0, LANES)[None, :]
                score = tl.load(row + block, mask=block < blocks, other=-1.0)
                best = tl.maximum(best, score.to(tl.int32, bitcast=True))
            highest = tl.max(best, 1)  # [RANKED]
            low, high = tl.zeros([RANKED], dtype=tl.int32), highest
            for _ in range(STEPS):
                middle = low + (high - low + 1) // 2
                enough = tl.sum((best >= middle[:, None]).to(tl.int32), 1) >= K
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
            # bisect for a threshold that just K blocks reach, if ties allow
            high = highest
            reached = _count(row, low, blocks, RANKED, LANES)
            while tl.max(((reached > K) & (low < high)).to(tl.int32), 0) > 0:
                middle = low + (high - low + 1) // 2
                count = _count(row, middle, blocks, RANKED, LANES)
                enough = count >= K
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
                reached = tl.where(enough, count, reached)

            # above 65536 times, and equal to the threshold: of these only the first fill the list
            above = _count(row, low + 1, blocks, RANKED, LANES)
            needed = tl.maximum(K - above, 0)[:, None]
            before = tl.zeros([RANKED], dtype=tl.int32)
            to = block_indices + ((first + offs_s).to(tl.int64) * H + h)[:, None] * K
            is_query = (first + offs_s < last)[:, None]
            for start in range(0, blocks, LANES):
                block = start + tl.arange(0, LANES)[None, :]
                bits = tl.load(row + block, mask=block < blocks, other=-1.0).to(tl.int32, bitcast=True)
                is_above, is_equal = bits > low[:, None], bits == low[:, None]
                marks = is_above.to(tl.int32) * 65536 + is_equal.to(tl.int32)
                place = before[:, None] + tl.cumsum(marks, 1) - marks
                chosen = is_above | (is_equal & ((place & 65535) < needed))
                place = (place >> 16) + tl.minimum(place & 65535, needed)
                tl.store(to + place, tl.zeros_like(place) + first_block + block, mask=chosen & is_query)
                before += tl.sum(marks, 1)
            offs_top = tl.arange(0, KP)[None, :]
            is_left = (offs_top >= blocks) & (offs_top < K) & is_query
            tl.store(to + offs_top, tl.full([RANKED, KP], -1, tl.int32), mask=is_left)
        tl.debug_barrier()  # nobody overwrites the scratch before all have read it


def select_blocks_triton(
    q: Tensor, keys: Tensor, lse: Tensor, branches: AttentionPlan, top_k: int, scale: float, tile: Tile | None = None
) -> Tensor:
    """The `top_k` best blocks, ids ascending, -1 at the end, of q (T, H * G, D) and keys (Tc, H, D).

    lse is that of base 2, (T, H * G) float32. Returns (T, H, top_k) int32.
    """
    (_, H, D), T, G = keys.shape, len(q), q.shape[1] // keys.shape[1]
    children, order = branches.children, branches.block_order
    if tile is None:
        tile = FP32 if q.dtype == torch.float32 else HALF if order is None else SEVERAL
    if children.ids is not None:
        keys = keys[children.ids]
    block_indices = torch.empty(T, H, top_k, dtype=torch.int32, device=q.device)
    GP = triton.next_power_of_2(G)
    BLOCK_Q = max(1, tile.rows // GP)
    tile_offsets, tile_samples = branches.samples.tiles(BLOCK_Q)
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = min(units * tile.programs, len(tile_samples) * H)
    stride = triton.cdiv(max(1, branches.max_blocks), 32) * 32
    scratch = torch.empty(programs * BLOCK_Q, stride, dtype=torch.float32, device=q.device)
    KP = max(2, triton.next_power_of_2(top_k))  # Triton 3.1 in its interpreter stores one number whatever the mask
    if programs:
        _select_kernel[(programs,)](
            q, keys, lse, children.offsets, children.offsets if order is None else order, tile_offsets, tile_samples,
            branches.samples.offsets, branches.sample_blocks, block_indices, scratch, scale * LOG2_E,
            len(branches.samples), len(tile_samples), stride, top_k,
            H=H, G=G, D=D, GP=GP, DP=max(16, triton.next_power_of_2(D)), KP=KP, LANES=max(LANES, 2 * KP),
            STEPS=BOUND_STEPS, BLOCK_Q=BLOCK_Q, BLOCK_B=tile.blocks, RANKED=min(tile.ranked, BLOCK_Q),
            HAS_ORDER=order is not None, INTERLEAVED=BLOCK_Q % 4 == 0 and GP >= 2,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return block_indices
