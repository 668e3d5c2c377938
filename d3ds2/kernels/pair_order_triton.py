"""Triton kernels that bring pairs (query, selected block) into the order of their blocks: a counting sort.

For few blocks: three launches in the place of the ten of a radix sort, which at a few thousand tokens are most of its
time. The definition is `pairs_by_block` of selection_attention_triton.py, by torch's sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # pairs of a program
GROUP = 32  # of them, or of the keys, that are compared with the tile at a time
MAX_BINS = 256
MAX_PAIRS = 1 << 18


@triton.jit
def _count_kernel(block_indices, keys, counts, PAIRS, H, S, M, TILES, TILE: tl.constexpr, GROUP: tl.constexpr):
    """One program: the keys of a tile, head * M + block, or H * M without a block; how many pairs have each key.

    counts is (keys, tiles).
    """
    tile = tl.program_id(0)
    pair = tile * TILE + tl.arange(0, TILE)
    block = tl.load(block_indices + pair, mask=pair < PAIRS, other=-1)
    key = tl.where(block < 0, H * M, pair // S % H * M + block)
    key = tl.where(pair < PAIRS, key, H * M + 1)
    tl.store(keys + pair, key)
    for first in range(0, H * M + 1, GROUP):
        some = first + tl.arange(0, GROUP)
        # 64 bits are what Triton 3.1's interpreter has after a sum, whatever it says
        count = tl.sum((key[:, None] == some[None, :]).to(tl.int32), 0).to(tl.int64)
        tl.store(counts + some * TILES + tile, count.to(tl.int32), mask=some <= H * M)


@triton.jit
def _place_kernel(
    keys, counts, ends, pair_offsets, pair_ids, PAIRS, BINS, TILES,
    TILE: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: puts the pairs of one tile behind those of the tiles before it which have the same key."""
    tile = tl.program_id(0)
    if tile == 0:
        some = tl.arange(0, KEYS)
        valid = some <= BINS
        at = some * TILES
        first = tl.load(ends + at, mask=valid, other=0) - tl.load(counts + at, mask=valid, other=0)
        tl.store(pair_offsets + some, first, mask=valid)
    pair = tile * TILE + tl.arange(0, TILE)
    key = tl.load(keys + pair)
    before = tl.zeros([TILE], dtype=tl.int32)  # pairs of this tile with the same key that come first
    for first in range(0, TILE, GROUP):
        other = tile * TILE + first + tl.arange(0, GROUP)
        same = key[:, None] == tl.load(keys + other)[None, :]
        before += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), 1)
    valid = pair < PAIRS
    at = tl.where(valid, key, 0) * TILES + tile
    place = tl.load(ends + at, mask=valid, other=0) - tl.load(counts + at, mask=valid, other=0) + before
    tl.store(pair_ids + place, pair, mask=valid)


def order_pairs_triton(block_indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Same contract as `pairs_by_block` for fewer than MAX_BINS lists and at most MAX_PAIRS pairs."""
    (_, H, S), PAIRS = block_indices.shape, block_indices.numel()
    bins, TILES = H * num_blocks, triton.cdiv(PAIRS, TILE)
    make = block_indices.new_empty
    keys, counts = make(TILES * TILE), make((bins + 1) * TILES)
    pair_offsets, pair_ids = make(bins + 1), make(PAIRS)
    tile = {"TILE": TILE, "GROUP": GROUP}
    _count_kernel[(TILES,)](block_indices, keys, counts, PAIRS, H, S, num_blocks, TILES, **tile)
    ends = counts.cumsum(0, dtype=torch.int32)
    _place_kernel[(TILES,)](
        keys, counts, ends, pair_offsets, pair_ids, PAIRS, bins, TILES, **tile, KEYS=triton.next_power_of_2(bins + 1)
    )
    return pair_offsets, pair_ids
