"""Triton kernels that sort the pairs of a query and a selected block; shapes and definition are in pair_order.py.

Pairs are sorted by their list: h * M + m for head h and block m, Hk * M for a place without a block. With few lists, a
counting sort takes three launches instead of a radix sort's ten, which are most of its time at a few thousand tokens.
With more, one kernel writes the lists, and torch sorts them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class OrderTile:
    """How the kernels cut their work.

    Args:
        counted: pairs of a program of the counting sort.
        compared: lists, or other pairs, that it compares with these at a time.
        listed: pairs whose lists a program writes for torch's sort.
    """

    counted: int = 128
    compared: int = 32
    listed: int = 1024


TILE = OrderTile()
MAX_LISTS = 256  # the counting sort takes fewer
MAX_PAIRS = 1 << 18  # that the counting sort takes


@triton.jit(do_not_specialize=["M"])  # the compiler must see that 16 divides PAIRS: it then loads four at once
def _list_kernel(block_indices, lists, PAIRS, Hk, K, M, BLOCK: tl.constexpr):
    """One program: the lists of BLOCK pairs."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(block_indices + pair, mask=pair < PAIRS, other=-1)
    tl.store(lists + pair, tl.where(block < 0, Hk * M, pair // K % Hk * M + block), mask=pair < PAIRS)


@triton.jit(do_not_specialize=["PAIRS", "M", "TILES"])
def _count_kernel(block_indices, lists, counts, PAIRS, Hk, K, M, TILES, BLOCK: tl.constexpr, COMPARED: tl.constexpr):
    """One program: the lists of the BLOCK pairs of a tile, and how many of these pairs each list has.

    counts is (lists, tiles). Beyond the last pair, the list is Hk * M + 1, which is not counted.
    """
    tile = tl.program_id(0)
    pair = tile * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(block_indices + pair, mask=pair < PAIRS, other=-1)
    own = tl.where(block < 0, Hk * M, pair // K % Hk * M + block)
    own = tl.where(pair < PAIRS, own, Hk * M + 1)
    tl.store(lists + pair, own)
    for first in range(0, Hk * M + 1, COMPARED):
        some = first + tl.arange(0, COMPARED)
        # Triton 3.1's interpreter makes a sum of 64 bits but says it has 32: the cast makes both agree
        count = tl.sum((own[:, None] == some[None, :]).to(tl.int32), 0).to(tl.int64)
        tl.store(counts + some * TILES + tile, count.to(tl.int32), mask=some <= Hk * M)


@triton.jit(do_not_specialize=["PAIRS", "LISTS", "TILES"])
def _place_kernel(
    lists, counts, ends, pair_offsets, pair_ids, PAIRS, LISTS, TILES,
    BLOCK: tl.constexpr, COMPARED: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """One program: puts the pairs of a tile behind those of earlier tiles in the same list.

    LISTS is their number without the last; LP is a power of 2 above it.
    """
    tile = tl.program_id(0)
    if tile == 0:
        some = tl.arange(0, LP)
        valid = some <= LISTS
        at = some * TILES
        first = tl.load(ends + at, mask=valid, other=0) - tl.load(counts + at, mask=valid, other=0)
        tl.store(pair_offsets + some, first, mask=valid)
    pair = tile * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(lists + pair)
    before = tl.zeros([BLOCK], dtype=tl.int32)  # earlier pairs of the tile in the same list
    for first in range(0, BLOCK, COMPARED):
        other = tile * BLOCK + first + tl.arange(0, COMPARED)
        same = own[:, None] == tl.load(lists + other)[None, :]
        before += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), 1)
    valid = pair < PAIRS
    at = tl.where(valid, own, 0) * TILES + tile
    place = tl.load(ends + at, mask=valid, other=0) - tl.load(counts + at, mask=valid, other=0) + before
    tl.store(pair_ids + place, pair, mask=valid)


def pairs_by_block_triton(block_indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of each head and block, as `pairs_by_block` does, for block_indices (T, Hk, K) int32."""
    (_, Hk, K), pairs = block_indices.shape, block_indices.numel()
    num_lists = Hk * num_blocks
    if 0 < num_lists < MAX_LISTS and 0 < pairs <= MAX_PAIRS:
        return count_pairs(block_indices, num_blocks)
    dtype = torch.int16 if num_lists < 1 << 15 else torch.int32  # a radix sort takes two passes instead of four
    lists = torch.empty(pairs, dtype=dtype, device=block_indices.device)
    if pairs:
        programs = triton.cdiv(pairs, TILE.listed)
        _list_kernel[(programs,)](block_indices, lists, pairs, Hk, K, num_blocks, BLOCK=TILE.listed)
    lists, pair_ids = lists.sort(stable=True)
    edges = torch.arange(num_lists + 1, dtype=dtype, device=block_indices.device)
    return torch.searchsorted(lists, edges, out_int32=True), pair_ids.int()


def count_pairs(block_indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return what `pairs_by_block` does, by a counting sort.

    block_indices is (T, Hk, K) int32, with fewer than MAX_LISTS lists and at most MAX_PAIRS pairs.
    """
    (_, Hk, K), pairs = block_indices.shape, block_indices.numel()
    num_lists, num_tiles = Hk * num_blocks, triton.cdiv(pairs, TILE.counted)
    make = block_indices.new_empty
    lists, counts = make(num_tiles * TILE.counted), make((num_lists + 1) * num_tiles)
    pair_offsets, pair_ids = make(num_lists + 1), make(pairs)
    sizes = {"BLOCK": TILE.counted, "COMPARED": TILE.compared}
    _count_kernel[(num_tiles,)](block_indices, lists, counts, pairs, Hk, K, num_blocks, num_tiles, **sizes)
    ends = counts.cumsum(0, dtype=torch.int32)
    _place_kernel[(num_tiles,)](
        lists, counts, ends, pair_offsets, pair_ids, pairs, num_lists, num_tiles,
        **sizes, LP=MAX_LISTS,
    )  # fmt: skip
    return pair_offsets, pair_ids
