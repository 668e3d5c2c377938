"""Triton kernels of the RMS norm of heads; the definition is in head_norm.py.

A program takes one head of some tokens. In the backward pass it also sums the gradient of gamma over its tokens.

Sizes named in this file:
    T  tokens      H  heads      D  channels per head
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS, BACKWARD_TOKENS, BLOCK_T = 64, 512, 32  # of a program, forward and backward, and those at a time
SMALLEST = tl.constexpr(1e-12)  # length by which shorter vectors are divided, as in torch's `normalize`


@triton.jit(do_not_specialize=["T"])
def _head_norm_kernel(
    x, gamma, out, T, STRIDE, H, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr,
    ROOT: tl.constexpr,
):  # fmt: skip
    """One program: x / |x| ROOT gamma in TOKENS tokens of one head; x has rows STRIDE numbers apart."""
    h, offs_d = tl.program_id(1), tl.arange(0, DP)
    b_gamma = tl.load(gamma + h * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32) * ROOT
    for i in range(0, TOKENS, BLOCK_T):
        token = (tl.program_id(0) * TOKENS + i + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (token < T)[:, None] & (offs_d < D)
        b_x = tl.load(x + token[:, None] * STRIDE + h * D + offs_d, mask=mask, other=0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), SMALLEST)
        tl.store(out + (token[:, None] * H + h) * D + offs_d, b_x / length[:, None] * b_gamma, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _head_norm_backward_kernel(
    x, gamma, dout, dx, partial, T, STRIDE, H, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """One program: dx in TOKENS tokens of one head, and their part of dgamma -> partial (tiles, H, D)."""
    h, offs_d = tl.program_id(1), tl.arange(0, DP)
    b_gamma = tl.load(gamma + h * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32) * ROOT
    b_dgamma = tl.zeros([DP], dtype=tl.float32)
    for i in range(0, TOKENS, BLOCK_T):
        token = (tl.program_id(0) * TOKENS + i + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (token < T)[:, None] & (offs_d < D)
        b_x = tl.load(x + token[:, None] * STRIDE + h * D + offs_d, mask=mask, other=0.0).to(tl.float32)
        at = (token[:, None] * H + h) * D + offs_d
        b_dout = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(b_x * b_x, 1))
        divisor = tl.maximum(length, SMALLEST)
        unit = b_x / divisor[:, None]
        b_dgamma += tl.sum(b_dout * unit, 0)
        b_d = b_dout * b_gamma
        along = tl.where(length > SMALLEST, tl.sum(b_d * unit, 1), 0.0)  # a shorter vector is divided by a constant
        tl.store(dx + at, (b_d - unit * along[:, None]) / divisor[:, None], mask=mask)
    tl.store(partial + (tl.program_id(0) * H + h) * D + offs_d, b_dgamma * ROOT, mask=offs_d < D)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma):
        ctx.save_for_backward(x, gamma)
        (T, H, _), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            _head_norm_kernel[triton.cdiv(T, TOKENS), H](
                x, gamma, out, T, x.stride(0), H, **_sizes(x), TOKENS=TOKENS, BLOCK_T=BLOCK_T
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gamma = ctx.saved_tensors
        (T, H, D), dx = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = triton.cdiv(T, BACKWARD_TOKENS)
        partial = torch.empty(tiles, H, D, dtype=torch.float32, device=x.device)
        if dx.numel():
            _head_norm_backward_kernel[tiles, H](
                x, gamma, dout.contiguous(), dx, partial, T, x.stride(0), H,
                **_sizes(x), TOKENS=BACKWARD_TOKENS, BLOCK_T=BLOCK_T,
            )  # fmt: skip
        return dx, partial.sum(0).to(gamma.dtype)


def head_rms_norm_triton(x: Tensor, gamma: Tensor) -> Tensor:
    """`head_rms_norm` of x (..., H, D), gamma (H, D): (..., H, D)."""
    rows = x.reshape(-1, *x.shape[-2:])  # tokens may lie apart, as queries beside keys do
    if rows.stride()[1:] != (x.shape[-1], 1):
        rows = rows.contiguous()
    return _HeadNorm.apply(rows, gamma.contiguous()).view(x.shape)


def _sizes(x: Tensor) -> dict:
    D = x.shape[2]
    return {"D": D, "DP": triton.next_power_of_2(D), "ROOT": D**0.5}
