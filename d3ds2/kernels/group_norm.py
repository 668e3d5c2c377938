"""Group norm of packed samples, each over its own tokens; on CUDA by the kernels of group_norm_triton.py.

Sizes named in this file:
    N  tokens, all samples packed      B  samples      C  channels
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import half_on_triton
from .ragged import Ragged

CPU_SLAB_BYTES = 1 << 18  # of rows in float32 at a time; they stay in a core's cache
SLAB_BYTES = 64 << 20  # on a device


def packed_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, samples: Ragged, num_groups: int, eps: float, silu: bool = False
) -> Tensor:
    """Group norm of each sample over its tokens and the channels of a group, then SiLU if `silu`.

    Statistics are in at least float32. Differentiable in x, weight and bias.

    Args:
        x: (N, C), the rows of `samples`; num_groups must divide C.
        weight, bias: (C,).

    Returns:
        (N, C), dtype of x.
    """
    if half_on_triton(x):
        from .group_norm_triton import group_norm_triton

        return group_norm_triton(x, weight, bias, samples, num_groups, eps, silu)
    return packed_group_norm_reference(x, weight, bias, samples, num_groups, eps, silu)


def packed_group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, samples: Ragged, num_groups: int, eps: float, silu: bool = False
) -> Tensor:
    """Definition of `packed_group_norm`, a slab of rows at a time: no copy of all rows in float32 is made."""
    normed = _GroupNorm.apply(x, weight, bias, samples, num_groups, eps)
    return torch.nn.functional.silu(normed, inplace=not torch.is_grad_enabled()) if silu else normed


class _GroupNorm(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias. The backward pass needs only x and (B, C) statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, samples, num_groups, eps):
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums, squares = (torch.zeros(len(samples), x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
        for b, rows in _slabs(x, samples):
            sums[b] += x[rows].sum(0, dtype=dtype)
        mean = _group_mean(sums / samples.divisors, num_groups)  # (B, C)
        for b, rows in _slabs(x, samples):
            squares[b] += (x[rows].to(dtype) - mean[b]).square_().sum(0)
        rstd = (_group_mean(squares / samples.divisors, num_groups) + eps).rsqrt()
        out, scale = torch.empty_like(x), rstd * weight
        for b, rows in _slabs(x, samples):
            centred = x[rows].to(dtype) - mean[b]
            out[rows] = torch.addcmul(bias, centred, scale[b], out=centred)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.samples, ctx.num_groups = samples, num_groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        samples, dtype = ctx.samples, mean.dtype
        sums = torch.zeros(2, *mean.shape, dtype=dtype, device=x.device)  # of dy and of dy · normed
        for b, rows in _slabs(x, samples):
            drows = dy[rows].to(dtype)
            sums[0, b] += drows.sum(0)
            sums[1, b] += (x[rows].to(dtype) - mean[b]).mul_(rstd[b]).mul_(drows).sum(0)
        dbias, dweight = sums.sum(1)
        mean_dy, mean_dy_normed = (_group_mean(part / samples.divisors * weight, ctx.num_groups) for part in sums)
        dx = torch.empty_like(x)
        for b, rows in _slabs(x, samples):
            normed = (x[rows].to(dtype) - mean[b]).mul_(rstd[b])
            centred = (dy[rows].to(dtype) * weight).sub_(mean_dy[b]).sub_(normed.mul_(mean_dy_normed[b]))
            dx[rows] = centred.mul_(rstd[b])
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _slabs(x: Tensor, samples: Ragged) -> Iterator[tuple[int, slice]]:
    """Yield the rows of every sample, some at a time: its number and a slice."""
    slab_bytes = CPU_SLAB_BYTES if x.device.type == "cpu" else SLAB_BYTES
    num_rows = len(x) if torch.compiler.is_compiling() else slab_bytes // (4 * x.shape[1])
    first = 0
    for b, length in enumerate(samples.lengths):
        last = first + length
        for begin in range(first, last, max(1, num_rows)):
            yield b, slice(begin, min(begin + max(1, num_rows), last))
        first = last


def _group_mean(per_channel: Tensor, num_groups: int) -> Tensor:
    """(B, C) -> (B, C): the mean of each channel's group."""
    group_size = per_channel.shape[1] // num_groups
    return per_channel.unflatten(1, (num_groups, group_size)).mean(2).repeat_interleave(group_size, dim=1)
