"""Triton kernel of sums of runs of rows; the definition is in segment_sum.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ragged import Ragged

MAX_BLOCK_N, MAX_BLOCK_C = 32, 64  # rows and channels at a time
LONG_BLOCK_N, LONG_BLOCK_C = 128, 16  # where the runs are few and may be long
FEW = 264 * MAX_BLOCK_C  # channels of all runs, below which a large GPU would be idle


@triton.jit
def _sum_kernel(x, offsets, ids, out, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HAS_IDS: tl.constexpr):
    """One program: BLOCK_C channels of one run."""
    run = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = tl.load(offsets + run + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for first in range(tl.load(offsets + run), last, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place.to(tl.int64)
        if HAS_IDS:
            row = tl.load(ids + place, mask=place < last, other=0).to(tl.int64)
        mask = (place < last)[:, None] & (offs_c < C)
        acc += tl.load(x + row[:, None] * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + run * C + offs_c, tl.sum(acc, 0), mask=offs_c < C)


def segment_sum_triton(x: Tensor, runs: Ragged) -> Tensor:
    """The rows of x (N, C) summed run by run, in a fixed order: (R, C) float32."""
    C = x.shape[1]
    out = torch.empty(len(runs), C, dtype=torch.float32, device=x.device)
    if out.numel():
        ids = runs.offsets if runs.ids is None else runs.ids
        BLOCK_N = MAX_BLOCK_N if runs.longest is None else min(MAX_BLOCK_N, triton.next_power_of_2(runs.longest))
        BLOCK_C = min(MAX_BLOCK_C, triton.next_power_of_2(C))
        if runs.longest is None and out.numel() < FEW:
            BLOCK_N, BLOCK_C = LONG_BLOCK_N, min(LONG_BLOCK_C, BLOCK_C)
        _sum_kernel[len(runs), triton.cdiv(C, BLOCK_C)](
            x.contiguous(), runs.offsets, ids, out, C, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, HAS_IDS=runs.ids is not None
        )
    return out
