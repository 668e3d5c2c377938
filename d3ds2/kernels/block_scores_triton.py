"""Triton kernel of the choice of blocks; shapes and definition are in block_scores.py.

A program takes a few queries with all heads of a group. It writes their probabilities, summed over the heads, for each
compressed key of the sample into a scratch row of its own, adds up the keys of each block, and finds the K-th best
score bit by bit. The scratch belongs to the programs that run at once, not to the tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .run_attention_triton import LOG2_E
from .runs import Branches

MAX_BLOCKS = 16384  # per sample: one program holds the scores of a query in registers


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts its work: query heads and keys at a time, scores held, warps, programs per multiprocessor."""

    rows: int = 128
    keys: int = 64
    scores: int = 2048
    warps: int = 4
    stages: int = 2
    programs: int = 4
    keys_first: bool = True


HALF, FP32 = Tile(rows=64, scores=1024, keys_first=False), Tile(rows=32, keys=32)


@triton.jit
def _select_kernel(
    q, keys, lse, key_ids, block_key_offsets, tile_offsets, tile_samples, query_offsets, sample_blocks,
    block_indices, scratch, scale_log2, B, num_tiles, STRIDE, K, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, MP: tl.constexpr, SUB: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CHILDREN: tl.constexpr, HAS_KEY_IDS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """One program: every so many tiles of BLOCK_Q queries and one key head."""
    offs, offs_d = tl.arange(0, BLOCK_Q * GP), tl.arange(0, DP)
    offs_q, offs_b, offs_top = tl.arange(0, BLOCK_Q), tl.arange(0, MP), tl.arange(0, KP)
    is_d = offs_d < D
    rows_of_scratch = scratch + (tl.program_id(0) * BLOCK_Q + offs_q).to(tl.int64) * STRIDE  # [BLOCK_Q]
    for work in range(tl.program_id(0), num_tiles * H, tl.num_programs(0)):
        tile, h = work // H, work % H
        sample = tl.load(tile_samples + tile)
        if sample < B:
            first = tl.load(query_offsets + sample) + (tile - tl.load(tile_offsets + sample)) * BLOCK_Q
            last = tl.load(query_offsets + sample + 1)
            first_block, last_block = tl.load(sample_blocks + sample), tl.load(sample_blocks + sample + 1)
            first_key, last_key = tl.load(block_key_offsets + first_block), tl.load(block_key_offsets + last_block)
            t, g = first + offs // GP, offs % GP
            valid = (t < last) & (g < G)
            at = (t.to(tl.int64) * H + h) * G + g
            b_q = tl.load(q + at[:, None] * D + offs_d, mask=valid[:, None] & is_d, other=0.0)  # [BLOCK_Q * GP, DP]
            b_lse = tl.load(lse + at, mask=valid, other=float("inf"))  # no head: no probability

            for j in range(first_key, last_key, BLOCK_K):
                offs_j = j + tl.arange(0, BLOCK_K)
                is_key = offs_j < last_key
                key = offs_j.to(tl.int64)
                if HAS_KEY_IDS:
                    key = tl.load(key_ids + offs_j, mask=is_key, other=0).to(tl.int64)
                b_k = tl.load(
                    keys + (key * H + h)[:, None] * D + offs_d, mask=is_key[:, None] & is_d, other=0.0
                )  # [BLOCK_K, DP]
                if KEYS_FIRST:
                    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - b_lse)
                    b_sum = tl.sum(tl.reshape(b_p, [BLOCK_K, BLOCK_Q, GP]), 2)  # [BLOCK_K, BLOCK_Q]
                    tl.store(rows_of_scratch + (offs_j - first_key)[:, None], b_sum, mask=is_key[:, None])
                else:
                    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - b_lse[:, None])
                    b_sum = tl.sum(tl.reshape(b_p, [BLOCK_Q, GP, BLOCK_K]), 1)  # [BLOCK_Q, BLOCK_K]
                    tl.store(rows_of_scratch[:, None] + (offs_j - first_key), b_sum, mask=is_key)
            tl.debug_barrier()  # the scratch is written by other threads than read it

            is_block = first_block + offs_b < last_block
            for sub in range(0, BLOCK_Q, SUB):
                offs_s = sub + tl.arange(0, SUB)
                row = scratch + (tl.program_id(0) * BLOCK_Q + offs_s).to(tl.int64)[:, None] * STRIDE  # [SUB, 1]
                if CHILDREN == 1:
                    score = tl.load(row + offs_b, mask=is_block, other=0.0)  # [SUB, MP]
                else:
                    child = tl.load(block_key_offsets + first_block + offs_b, mask=is_block, other=0)
                    end = tl.load(block_key_offsets + first_block + offs_b + 1, mask=is_block, other=0)
                    score = tl.zeros([SUB, MP], dtype=tl.float32)
                    for i in range(CHILDREN):
                        score += tl.load(row + (child + i - first_key), mask=child + i < end, other=0.0)
                bits = tl.where(is_block, score.to(tl.int32, bitcast=True), -1)  # of positive floats: in their order

                # the largest threshold which K blocks reach, or 0 where there are no K blocks
                threshold = tl.zeros([SUB], dtype=tl.int32)
                reached = tl.zeros([SUB], dtype=tl.int32) + (last_block - first_block)
                bit = 30
                while bit >= 0:
                    higher = threshold | (1 << bit)
                    count = tl.sum((bits >= higher[:, None]).to(tl.int32), 1)
                    threshold = tl.where(count >= K, higher, threshold)
                    reached = tl.where(count >= K, count, reached)
                    bit = tl.where(tl.max(reached, 0) <= K, -1, bit - 1)

                above, equal = bits > threshold[:, None], bits == threshold[:, None]
                needed = K - tl.sum(above.to(tl.int32), 1)[:, None]  # of those equal to the threshold, the first
                marks = above.to(tl.int32) * 65536 + equal.to(tl.int32)
                before = tl.cumsum(marks, 1) - marks
                chosen = above | (equal & ((before & 65535) < needed))
                place = (before >> 16) + tl.minimum(before & 65535, needed)
                to = block_indices + ((first + offs_s).to(tl.int64) * H + h)[:, None] * K
                real = (first + offs_s < last)[:, None]
                tl.store(to + place, tl.zeros_like(place) + first_block + offs_b, mask=chosen & real)
                is_left = offs_top[None, :] >= tl.sum(chosen.to(tl.int32), 1)[:, None]
                tl.store(to + offs_top, tl.full([SUB, KP], -1, tl.int32), mask=is_left & real & (offs_top < K))
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
    children = branches.children
    tile = (FP32 if q.dtype == torch.float32 else HALF) if tile is None else tile
    block_indices = torch.empty(T, H, top_k, dtype=torch.int32, device=q.device)
    MP, GP = max(16, triton.next_power_of_2(branches.max_blocks)), triton.next_power_of_2(G)
    BLOCK_Q = max(1, tile.rows // GP)
    tile_offsets, tile_samples = branches.samples.tiles(BLOCK_Q)
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = min(units * tile.programs, len(tile_samples) * H)
    stride = triton.cdiv(max(1, branches.max_compressed), 32) * 32
    scratch = torch.empty(programs * BLOCK_Q, stride, dtype=torch.float32, device=q.device)
    if programs:
        _select_kernel[(programs,)](
            q, keys, lse, children.offsets if children.ids is None else children.ids, children.offsets, tile_offsets,
            tile_samples, branches.samples.offsets, branches.sample_blocks, block_indices, scratch, scale * LOG2_E,
            len(branches.samples), len(tile_samples), stride, top_k,
            H=H, G=G, D=D, GP=GP, DP=max(16, triton.next_power_of_2(D)), KP=triton.next_power_of_2(top_k), MP=MP,
            SUB=max(1, min(BLOCK_Q, tile.scores // MP)), BLOCK_Q=BLOCK_Q, BLOCK_K=tile.keys,
            CHILDREN=branches.max_children, HAS_KEY_IDS=children.ids is not None, KEYS_FIRST=tile.keys_first,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return block_indices
