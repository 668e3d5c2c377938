"""Triton kernel of the numbers that the backward pass of attention needs of each query: its lse and Σ out · dout.

The definition of the backward pass, to which they belong, is in ragged_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # rows (token, query head) of a program


@triton.jit(do_not_specialize=["ROWS"])
def _stats_kernel(out, dout, lse, stats, ROWS, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """One program: lse and the sum of out * dout of BLOCK rows, side by side."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DP)
    valid = row < ROWS
    at, mask = row[:, None] * D + offs_d, valid[:, None] & (offs_d < D)
    b_o = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    b_do = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(stats + row * 2, tl.load(lse + row, mask=valid, other=0.0), mask=valid)
    tl.store(stats + row * 2 + 1, tl.sum(b_o * b_do, 1), mask=valid)


def attention_stats(lse: Tensor, out: Tensor, dout: Tensor) -> Tensor:
    """Return lse and the sum of out * dout over D: lse (T, H) float32, out and dout (T, H, D) -> (T, H, 2) float32."""
    T, H, D = out.shape
    stats = torch.empty(T, H, 2, dtype=torch.float32, device=out.device)
    if stats.numel():
        _stats_kernel[(triton.cdiv(T * H, BLOCK),)](
            out, dout, lse, stats, T * H, D=D, DP=triton.next_power_of_2(D), BLOCK=BLOCK
        )
    return stats
