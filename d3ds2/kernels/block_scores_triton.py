"""Triton kernel that selects blocks; shapes and definition are in block_scores.py.

A program takes a few queries, with all heads of their group. It first writes the score of each block of the sample to a
scratch row per query: the sum of the block's probabilities over its compressed keys and over the heads. Then it finds
the K-th best score of each row, and with it the K best blocks. There are only as many scratch rows as the programs that
run at once need, whatever the number of tokens.

In the kernels H is the number of key/value heads. GP, DP and KP are G, D and K rounded up to a power of 2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import abilities
from .ragged import AttentionPlan
from .ragged_attention_triton import LOG2_E


@dataclass(frozen=True)
class ScoreTile:
    """How the kernel cuts its work.

    Args:
        rows: queries times their G heads that a program scores at a time.
        blocks: blocks that it scores at a time.
        ranked: queries whose blocks it ranks at a time.
        lanes: scores of a query that it reads at a time; at least twice K are taken.
        bound_steps: steps of the bisection for a lower bound of the K-th best score.
        warps, stages: warps of a program, and stages of its pipeline.
        programs: programs per multiprocessor.
    """

    rows: int = 64
    blocks: int = 32
    ranked: int = 1
    lanes: int = 128
    bound_steps: int = 16
    warps: int = 1
    stages: int = 2
    programs: int = 12


HALF = ScoreTile(programs=28)  # half precision, one compressed key per block
HALF_SEVERAL_KEYS = ScoreTile(programs=32)
FP32 = ScoreTile(warps=4, programs=4)


@triton.jit
def _head_sums(
    b_q, b_lse, keys, rows, there, h, scale_log2, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of the compressed keys in `rows`, summed over the heads: [BLOCK_B, BLOCK_Q]."""
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
    """Count the scores in each scratch row whose bits are at least `low`: [RANKED]."""
    count = tl.zeros([RANKED], dtype=tl.int32)
    for start in range(0, blocks, LANES):
        block = start + tl.arange(0, LANES)[None, :]
        bits = tl.load(row + block, mask=block < blocks, other=-1.0).to(tl.int32, bitcast=True)
        count += tl.sum((bits >= low[:, None]).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["B"])
def _select_kernel(
    q, keys, lse, block_key_offsets, block_order, tile_offsets, tile_samples, query_offsets, sample_blocks,
    block_indices, scratch, scale_log2, B, STRIDE, K, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr, RANKED: tl.constexpr, HAS_ORDER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program: tiles of BLOCK_Q queries in one key/value head, every so many. The keys are sorted by block."""
    offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
    if INTERLEAVED:  # one thread holds all heads of a query, so it sums them without exchanging data
        in_tile, g = offs // (4 * GP) * 4 + offs % 8 // 2, offs % (4 * GP) // 8 * 2 + offs % 2
    else:
        in_tile, g = offs // GP, offs % GP
    rows_of_scratch = scratch + (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64) * STRIDE
    for work in range(tl.program_id(0), tl.load(tile_offsets + B) * H, tl.num_programs(0)):  # without spare tiles
        tile, h = work // H, work % H
        sample = tl.load(tile_samples + tile)
        first = tl.load(query_offsets + sample) + (tile - tl.load(tile_offsets + sample)) * BLOCK_Q
        queries = tl.minimum(tl.load(query_offsets + sample + 1) - first, BLOCK_Q)
        first_block = tl.load(sample_blocks + sample)
        blocks = tl.load(sample_blocks + sample + 1) - first_block
        valid = (in_tile < queries) & (g < G)
        at = ((first + in_tile).to(tl.int64) * H + h) * G + g
        mask = valid[:, None] & (offs_d < D)[None, :]
        b_q = tl.load(q + at[:, None] * D + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_Q * GP, DP]
        b_lse = tl.load(lse + at, mask=valid, other=float("inf"))  # a head that is not there adds 0

        for start in range(0, blocks, BLOCK_B):
            block = start + tl.arange(0, BLOCK_B)
            real = block < blocks
            if HAS_ORDER:  # blocks with most keys come first, so the blocks of a tile have about equally many
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
        tl.debug_barrier()  # a thread reads scores that others have written

        for sub in range(0, BLOCK_Q, RANKED):  # constant bounds: a count of queries is slower
            offs_s = sub + tl.arange(0, RANKED)
            row = scratch + (tl.program_id(0) * BLOCK_Q + offs_s).to(tl.int64)[:, None] * STRIDE  # [RANKED, 1]
            # Positive floats have the order of their bits. Each lane keeps the best score it has seen; the K-th best
            # of the lanes is a lower bound of the K-th best score, and STEPS steps come close to it
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
            # bisect for the threshold that exactly K blocks reach; with ties, more may reach it
            high = highest
            reached = _count(row, low, blocks, RANKED, LANES)
            while tl.max(((reached > K) & (low < high)).to(tl.int32), 0) > 0:
                middle = low + (high - low + 1) // 2
                count = _count(row, middle, blocks, RANKED, LANES)
                enough = count >= K
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
                reached = tl.where(enough, count, reached)

            # All blocks above the threshold are taken, and of those equal to it the first, until there are K. One sum
            # counts both: blocks above in units of 65536, blocks equal in units of 1
            above = _count(row, low + 1, blocks, RANKED, LANES)
            needed = tl.maximum(K - above, 0)[:, None]
            before = tl.zeros([RANKED], dtype=tl.int32)
            to = block_indices + ((first + offs_s).to(tl.int64) * H + h)[:, None] * K
            is_query = (offs_s < queries)[:, None]
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
        tl.debug_barrier()  # all threads have read the scratch before one overwrites it


def select_blocks_triton(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    branches: AttentionPlan,
    top_k: int,
    scale: float,
    tile: ScoreTile | None = None,
) -> Tensor:
    """Return the `top_k` best blocks for each query and key/value head, as `select_blocks` does.

    Args:
        q: queries (T, H, D).
        keys: compressed keys (Tc, Hk, D).
        lse: logsumexp in base 2 of each query's scores over the compressed keys of its sample, (T, H) float32.
        branches: the rows that each branch pairs.
        top_k: blocks to select, K.
        scale: factor on the scores.
        tile: how the kernel cuts its work. Default: by the dtype of q.

    Returns:
        Global block ids (T, Hk, K) int32, ascending, padded at the end with -1.
    """
    (_, Hk, D), T, G = keys.shape, len(q), q.shape[1] // keys.shape[1]
    children, order = branches.children, branches.block_order
    if tile is None:
        tile = FP32 if q.dtype == torch.float32 else HALF if order is None else HALF_SEVERAL_KEYS
    if children.ids is not None:
        keys = keys[children.ids]
    block_indices = torch.empty(T, Hk, top_k, dtype=torch.int32, device=q.device)
    GP = triton.next_power_of_2(G)
    BLOCK_Q = max(1, tile.rows // GP)
    tile_offsets, tile_samples = branches.samples.tiles(BLOCK_Q)
    programs = min(abilities(q.device).multiprocessors * tile.programs, len(tile_samples) * Hk)
    stride = triton.cdiv(max(1, branches.max_blocks), 32) * 32
    scratch = torch.empty(programs * BLOCK_Q, stride, dtype=torch.float32, device=q.device)
    KP = max(2, triton.next_power_of_2(top_k))  # Triton 3.1's interpreter stores a single number whatever the mask says
    if programs:
        _select_kernel[(programs,)](
            q, keys, lse, children.offsets, children.offsets if order is None else order, tile_offsets, tile_samples,
            branches.samples.offsets, branches.sample_blocks, block_indices, scratch, scale * LOG2_E,
            len(branches.samples), stride, top_k,
            H=Hk, G=G, D=D, GP=GP, DP=max(16, triton.next_power_of_2(D)), KP=KP, LANES=max(tile.lanes, 2 * KP),
            STEPS=tile.bound_steps, BLOCK_Q=BLOCK_Q, BLOCK_B=tile.blocks, RANKED=min(tile.ranked, BLOCK_Q),
            HAS_ORDER=order is not None, INTERLEAVED=BLOCK_Q % 4 == 0 and GP >= 2,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return block_indices
