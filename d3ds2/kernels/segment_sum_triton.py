"""Triton kernel of `segment_sum`; the definition is in segment_sum.py.

Sizes named in this file:
    N  rows      S  segments      C  channels
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import abilities
from .ragged import Ragged

MAX_BLOCK_N, MAX_BLOCK_C = 32, 64  # rows and channels at a time
LONG_BLOCK_N, LONG_BLOCK_C = 128, 16  # the same where segments are few and may be long
PROGRAMS = 2  # programs of a multiprocessor, below which the usual tiles would leave the GPU idle


@triton.jit
def _sum_kernel(x, offsets, ids, out, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HAS_IDS: tl.constexpr):
    """One program: BLOCK_C channels of one segment."""
    segment = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = tl.load(offsets + segment + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for first in range(tl.load(offsets + segment), last, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = place.to(tl.int64)
        if HAS_IDS:
            row = tl.load(ids + place, mask=place < last, other=0).to(tl.int64)
        mask = (place < last)[:, None] & (offs_c < C)
        acc += tl.load(x + row[:, None] * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + segment * C + offs_c, tl.sum(acc, 0), mask=offs_c < C)


def segment_sum_triton(x: Tensor, segments: Ragged) -> Tensor:
    """Sum the rows of x (N, C) in each segment, in a fixed order: (S, C) float32."""
    C = x.shape[1]
    out = torch.empty(len(segments), C, dtype=torch.float32, device=x.device)
    if out.numel():
        ids = segments.offsets if segments.ids is None else segments.ids
        BLOCK_N = (
            MAX_BLOCK_N if segments.longest is None else min(MAX_BLOCK_N, triton.next_power_of_2(segments.longest))
        )
        BLOCK_C = min(MAX_BLOCK_C, triton.next_power_of_2(C))
        if segments.longest is None and out.numel() < PROGRAMS * abilities(x.device).multiprocessors * MAX_BLOCK_C:
            BLOCK_N, BLOCK_C = LONG_BLOCK_N, min(LONG_BLOCK_C, BLOCK_C)
        _sum_kernel[len(segments), triton.cdiv(C, BLOCK_C)](
            x.contiguous(),
            segments.offsets,
            ids,
            out,
            C,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            HAS_IDS=segments.ids is not None,
        )
    return out
