"""Triton kernels that cut segments of rows into tiles; the definition is `cut_reference` of ragged.py.

They take two launches, torch nine. With a few thousand tokens, launches are most of the time.
"""

import triton
import triton.language as tl
from torch import Tensor

SEGMENTS, TILES = 1024, 128  # segments, and tiles of a segment, at a time


@triton.jit(do_not_specialize=["S", "SIZE"])
def _tile_offsets_kernel(offsets, tile_offsets, S, SIZE, BLOCK: tl.constexpr):
    """One program for all segments: the number of tiles before each."""
    tl.store(tile_offsets, 0)
    before = 0
    for start in range(0, S, BLOCK):
        segment = start + tl.arange(0, BLOCK)
        valid = segment < S
        rows = tl.load(offsets + segment + 1, mask=valid, other=0) - tl.load(offsets + segment, mask=valid, other=0)
        tiles = (rows + (SIZE - 1)) // SIZE
        ends = before + tl.cumsum(tiles, 0).to(tl.int64)  # Triton 3.1's interpreter makes it int64 in any case
        tl.store(tile_offsets + 1 + segment, ends.to(tl.int32), mask=valid)
        before += tl.sum(tiles, 0)


@triton.jit(do_not_specialize=["S", "CAPACITY"])
def _tile_segments_kernel(tile_offsets, tile_segments, S, CAPACITY, BLOCK: tl.constexpr):
    """One program: the tiles of one segment; those beyond the last belong to segment S."""
    segment = tl.program_id(0)
    last = tl.where(segment < S, tl.load(tile_offsets + tl.minimum(segment + 1, S)), CAPACITY)
    for start in range(tl.load(tile_offsets + segment), last, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_segments + tile, tl.zeros([BLOCK], dtype=tl.int32) + segment, mask=tile < last)


def cut_triton(offsets: Tensor, size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """`cut_reference`: first tile of each segment (S + 1,) and segment of each tile (capacity,), both int32."""
    S = offsets.numel() - 1
    tile_offsets, tile_segments = offsets.new_empty(S + 1), offsets.new_empty(capacity)
    _tile_offsets_kernel[(1,)](offsets, tile_offsets, S, size, BLOCK=SEGMENTS)
    _tile_segments_kernel[(S + 1,)](tile_offsets, tile_segments, S, capacity, BLOCK=TILES)
    return tile_offsets, tile_segments
