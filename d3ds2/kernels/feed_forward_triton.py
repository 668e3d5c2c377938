"""Triton kernel of the gradient of GELU (tanh) in the feed-forward layers; their definition is in feed_forward.py.

Sizes named in this file:
    N  rows      F  channels of the hidden layer
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK_N, BLOCK_F, WARPS = 128, 16, 256, 4  # rows of a program; rows and channels at a time


@triton.jit(do_not_specialize=["N"])
def _gelu_backward_kernel(
    u, dhidden, hidden, du, partial, N, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: GELU(u) -> hidden and the gradient of u -> du, in ROWS rows and BLOCK_F channels.

    The sum of the gradient over the rows goes to partial (tiles, F). hidden may be u, and du may be dhidden.
    """
    first, offs_f = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    for i in range(0, ROWS, BLOCK_N):
        row = first + i + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * F + offs_f
        mask = (row < N)[:, None] & (offs_f < F)
        b_u = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
        b_d = tl.load(dhidden + at, mask=mask, other=0.0).to(tl.float32)
        square = b_u * b_u
        # tanh(a) = 2 sigmoid(2 a) - 1 for a = sqrt(2 / pi) (u + 0.044715 u³), so GELU(u) = u sigmoid(2 a)
        share = tl.sigmoid(1.5957691216057308 * b_u * (1.0 + 0.044715 * square))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        b_du = b_d * (share + b_u * share * (1.0 - share) * slope)
        total += tl.sum(b_du, 0)
        tl.store(hidden + at, b_u * share, mask=mask)
        tl.store(du + at, b_du, mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * F + offs_f, total, mask=offs_f < F)


def gelu_backward(u: Tensor, dhidden: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return GELU(u), the gradient of u, and its sum over the rows.

    Args:
        u: the input of GELU, (N, F).
        dhidden: gradient of GELU(u), (N, F); it is overwritten by the gradient of u.
        in_place: overwrite u by GELU(u).

    Returns:
        (N, F), (N, F) and (F,) float32.
    """
    (N, F), tiles = u.shape, triton.cdiv(len(u), ROWS)
    u, dhidden = u.contiguous(), dhidden.contiguous()
    hidden = u if in_place else torch.empty_like(u)
    partial = torch.empty(tiles, F, dtype=torch.float32, device=u.device)
    if tiles:
        _gelu_backward_kernel[tiles, triton.cdiv(F, BLOCK_F)](
            u, dhidden, hidden, dhidden, partial, N, F=F, ROWS=ROWS, BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, num_warps=WARPS
        )
    return hidden, dhidden, partial.sum(0)
