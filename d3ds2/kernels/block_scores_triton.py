"""Triton kernel of the choice of blocks; shapes and definition are in block_scores.py.

A program takes a few queries with all heads of a group. It writes the scores of the blocks of the sample, each block's
probabilities summed over its compressed keys and the heads, into a scratch row per query, and bisects for the K-th
best. The scratch belongs to the programs that run at once, not to the tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .run_attention_triton import LOG2_E
from .runs import Branches

LANES = 128  # scores that a warp holds beside each other
MAX_BLOCKS = 16384  # per sample: one program holds the scores of a query in registers


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts its work: query heads and blocks at a time, warps, stages, programs per multiprocessor."""

    rows: int = 64
    blocks: int = 32
    warps: int = 1
    stages: int = 2
    programs: int = 12


HALF, FP32 = Tile(), Tile(rows=32, warps=4, programs=4)
MANY = Tile(blocks=64, warps=4, programs=4)  # more scores than the registers of one warp hold well
MAX_BLOCKS_OF_WARP = 1024


@triton.jit
def _head_sums(
    b_q, b_lse, keys, key_ids, places, there, h, scale_log2, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    GP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr, HAS_KEY_IDS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Probabilities of the compressed keys at `places`, summed over the heads: [BLOCK_B, BLOCK_Q]."""
    offs_d = tl.arange(0, DP)
    row = places.to(tl.int64)
    if HAS_KEY_IDS:
        row = tl.load(key_ids + places, mask=there, other=0).to(tl.int64)
    mask = there[:, None] & (offs_d < D)[None, :]
    b_k = tl.load(keys + (row * H + h)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - b_lse[None, :])
    if INTERLEAVED:
        b_p = tl.reshape(b_p, [BLOCK_B, BLOCK_Q // 4, GP // 2, 4, 2])
        return tl.reshape(tl.sum(tl.sum(b_p, 4), 2), [BLOCK_B, BLOCK_Q])
    else:
        return tl.sum(tl.reshape(b_p, [BLOCK_B, BLOCK_Q, GP]), 2)


@triton.jit
def _select_kernel(
    q, keys, lse, key_ids, block_key_offsets, block_order, tile_offsets, tile_samples, query_offsets, sample_blocks,
    block_indices, scratch, scale_log2, B, num_tiles, STRIDE, K, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, MP: tl.constexpr, LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr, HAS_KEY_IDS: tl.constexpr, HAS_ORDER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program: every so many tiles of BLOCK_Q queries and one key head."""
    offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
    if INTERLEAVED:  # the heads of a query are columns that one thread holds: their sum takes no exchange
        in_tile, g = offs // (4 * GP) * 4 + offs % 8 // 2, offs % (4 * GP) // 8 * 2 + offs % 2
    else:
        in_tile, g = offs // GP, offs % GP
    offs_b, offs_top = tl.arange(0, MP), tl.arange(0, KP)
    rows_of_scratch = scratch + (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64) * STRIDE
    for work in range(tl.program_id(0), num_tiles * H, tl.num_programs(0)):
        tile, h = work // H, work % H
        sample = tl.load(tile_samples + tile)
        if sample < B:
            first = tl.load(query_offsets + sample) + (tile - tl.load(tile_offsets + sample)) * BLOCK_Q
            last = tl.load(query_offsets + sample + 1)
            first_block = tl.load(sample_blocks + sample)
            blocks = tl.load(sample_blocks + sample + 1) - first_block
            t = first + in_tile
            valid = (t < last) & (g < G)
            at = (t.to(tl.int64) * H + h) * G + g
            mask = valid[:, None] & (offs_d < D)[None, :]
            b_q = tl.load(q + at[:, None] * D + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_Q * GP, DP]
            b_lse = tl.load(lse + at, mask=valid, other=float("inf"))  # no head: no probability

            first_key = tl.load(block_key_offsets + first_block)
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
                            b_q, b_lse, keys, key_ids, key + i, i < children, h, scale_log2, H, D, DP, GP, BLOCK_Q,
                            BLOCK_B, HAS_KEY_IDS, INTERLEAVED,
                        )  # fmt: skip
                        b_score += tl.where((i < children)[:, None], b_sum, 0.0)
                else:
                    b_score = _head_sums(
                        b_q, b_lse, keys, key_ids, first_key + block, real, h, scale_log2, H, D, DP, GP, BLOCK_Q,
                        BLOCK_B, HAS_KEY_IDS, INTERLEAVED,
                    )  # fmt: skip
                tl.store(rows_of_scratch[None, :] + block[:, None], b_score, mask=real[:, None])
            tl.debug_barrier()  # the scratch is written by other threads than read it

            for sub in range(0, BLOCK_Q):
                if first + sub < last:
                    row = scratch + (tl.program_id(0) * BLOCK_Q + sub).to(tl.int64) * STRIDE
                    score = tl.load(row + offs_b, mask=offs_b < blocks, other=0.0)
                    bits = tl.where(offs_b < blocks, score.to(tl.int32, bitcast=True), -1)  # positive: in their order
                    # bisect for a threshold that just K blocks reach; it is at least the least of the best of KP groups
                    best = tl.max(tl.reshape(bits, [MP // LANES, LANES]), 0)
                    high = tl.max(best, 0)
                    low = high * 0
                    if KP <= LANES:
                        low = tl.maximum(tl.min(tl.max(tl.reshape(best, [KP, LANES // KP]), 1), 0), 0)
                    reached = tl.sum((bits >= low).to(tl.int32), 0)
                    while (reached > K) & (low < high):
                        middle = low + (high - low + 1) // 2
                        count = tl.sum((bits >= middle).to(tl.int32), 0)
                        if count >= K:
                            low = middle
                            reached = count
                        else:
                            high = middle - 1

                    to = block_indices + ((first + sub).to(tl.int64) * H + h) * K
                    needed = K - tl.sum((bits > low).to(tl.int32), 0)  # of those equal to the threshold, the first
                    above_before = low * 0
                    equal_before = low * 0
                    for start in range(0, blocks, LANES):
                        block = start + tl.arange(0, LANES)
                        real = block < blocks
                        part = tl.load(row + block, mask=real, other=0.0).to(tl.int32, bitcast=True)
                        above, equal = real & (part > low), real & (part == low)
                        marks = above.to(tl.int32) * 65536 + equal.to(tl.int32)
                        before = tl.cumsum(marks, 0) - marks
                        above_place, equal_place = above_before + (before >> 16), equal_before + (before & 65535)
                        chosen = above | (equal & (equal_place < needed))
                        place = above_place + tl.minimum(equal_place, needed)
                        tl.store(to + place, first_block + block, mask=chosen)
                        total = tl.sum(marks, 0)
                        above_before += total >> 16
                        equal_before += total & 65535
                    is_left = (offs_top >= blocks) & (offs_top < K)
                    tl.store(to + offs_top, tl.full([KP], -1, tl.int32), mask=is_left)
            tl.debug_barrier()  # nobody overwrites the scratch before all have read it


def select_blocks_triton(
    q: Tensor, keys: Tensor, lse: Tensor, branches: Branches, top_k: int, scale: float, tile: Tile | None = None
) -> Tensor:
    """The `top_k` best blocks, ids ascending, -1 at the end, of q (T, H * G, D) and keys (Tc, H, D).

    lse is that of base 2, (T, H * G) float32. Returns (T, H, top_k) int32. Raises ValueError for too many blocks.
    """
    if branches.max_blocks > MAX_BLOCKS:
        raise ValueError(f"expected at most {MAX_BLOCKS} selection blocks in a sample, got {branches.max_blocks}")
    (_, H, D), T, G = keys.shape, len(q), q.shape[1] // keys.shape[1]
    children, order = branches.children, branches.block_order
    if tile is None:
        tile = FP32 if q.dtype == torch.float32 else HALF if branches.max_blocks <= MAX_BLOCKS_OF_WARP else MANY
    block_indices = torch.empty(T, H, top_k, dtype=torch.int32, device=q.device)
    MP, GP = max(LANES, triton.next_power_of_2(branches.max_blocks)), triton.next_power_of_2(G)
    BLOCK_Q = max(1, tile.rows // GP)
    tile_offsets, tile_samples = branches.samples.tiles(BLOCK_Q)
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = min(units * tile.programs, len(tile_samples) * H)
    stride = triton.cdiv(max(1, branches.max_blocks), 32) * 32
    scratch = torch.empty(programs * BLOCK_Q, stride, dtype=torch.float32, device=q.device)
    KP = max(2, triton.next_power_of_2(top_k))  # Triton 3.1, in its interpreter, stores one number whatever the mask
    if programs:
        _select_kernel[(programs,)](
            q, keys, lse, children.offsets if children.ids is None else children.ids, children.offsets,
            children.offsets if order is None else order, tile_offsets, tile_samples, branches.samples.offsets,
            branches.sample_blocks, block_indices, scratch, scale * LOG2_E, len(branches.samples), len(tile_samples),
            stride, top_k,
            H=H, G=G, D=D, GP=GP, DP=max(16, triton.next_power_of_2(D)), KP=KP, MP=MP, LANES=LANES,
            BLOCK_Q=BLOCK_Q, BLOCK_B=tile.blocks, HAS_KEY_IDS=children.ids is not None, HAS_ORDER=order is not None,
            INTERLEAVED=BLOCK_Q % 4 == 0 and GP >= 2, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return block_indices
