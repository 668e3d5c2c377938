"""Triton kernels which cut runs of rows into tiles; the definition is `cut` of ragged.py.

Two launches in the place of nine: at a few thousand tokens the launches are most of the time.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # runs, or tiles of a run, at a time


@triton.jit
def _tile_offsets_kernel(offsets, tile_offsets, S, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for all: how many tiles the runs before each have."""
    tl.store(tile_offsets, 0)
    before = 0
    for start in range(0, S, BLOCK):
        run = start + tl.arange(0, BLOCK)
        valid = run < S
        rows = tl.load(offsets + run + 1, mask=valid, other=0) - tl.load(offsets + run, mask=valid, other=0)
        tiles = (rows + (SIZE - 1)) // SIZE
        ends = before + tl.cumsum(tiles, 0).to(tl.int64)  # as Triton 3.1's interpreter has it anyway
        tl.store(tile_offsets + 1 + run, ends.to(tl.int32), mask=valid)
        before += tl.sum(tiles, 0)


@triton.jit
def _tile_runs_kernel(tile_offsets, tile_runs, S, CAPACITY, BLOCK: tl.constexpr):
    """One program: the tiles of one run; those beyond the last are of run S."""
    run = tl.program_id(0)
    last = tl.where(run < S, tl.load(tile_offsets + tl.minimum(run + 1, S)), CAPACITY)
    for start in range(tl.load(tile_offsets + run), last, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_runs + tile, tl.zeros([BLOCK], dtype=tl.int32) + run, mask=tile < last)


def cut_triton(offsets: Tensor, size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Same contract as `cut` of ragged.py."""
    S = offsets.numel() - 1
    tile_offsets, tile_runs = offsets.new_empty(S + 1), offsets.new_empty(capacity)
    _tile_offsets_kernel[(1,)](offsets, tile_offsets, S, SIZE=size, BLOCK=min(BLOCK, triton.next_power_of_2(S + 1)))
    _tile_runs_kernel[(S + 1,)](tile_offsets, tile_runs, S, capacity, BLOCK=128)
    return tile_offsets, tile_runs
