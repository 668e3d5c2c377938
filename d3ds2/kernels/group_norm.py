"""Group norm of packed samples, each over its own tokens; on CUDA by the kernels of group_norm_triton.py.

Sizes named in this file:
    N  tokens, all samples packed      B  samples      C  channels
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import half_on_triton
from .ragged import Ragged
from .segment_sum import per_token, sample_means


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
    """Definition of `packed_group_norm`."""
    normed = _GroupNorm.apply(x, weight, bias, samples, num_groups, eps)
    return torch.nn.functional.silu(normed) if silu else normed


class _GroupNorm(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias. The backward pass needs only x and (B, C) statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, samples, num_groups, eps):
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _group_mean(sample_means(rows, samples), num_groups)  # (B, C)
        centred = rows - per_token(mean, samples)
        variance = _group_mean(sample_means(centred.square(), samples), num_groups)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.samples, ctx.num_groups = samples, num_groups
        return torch.addcmul(bias, centred, per_token(rstd * weight, samples)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        samples, drows = ctx.samples, dy.to(mean.dtype)
        mean_of_token, rstd_of_token = per_token(torch.cat([mean, rstd], dim=1), samples).chunk(2, dim=1)
        normed = (x.to(mean.dtype) - mean_of_token) * rstd_of_token
        means = sample_means(drows, samples), sample_means(drows * normed, samples)  # (B, C) of dy and of dy · normed
        counts = samples.offsets.diff()[:, None]
        dbias, dweight = ((m * counts).sum(0) for m in means)
        both = torch.cat([_group_mean(m * weight, ctx.num_groups) for m in means], dim=1)
        mean_dy, mean_dy_normed = per_token(both, samples).chunk(2, dim=1)
        dx = ((drows * weight - mean_dy - normed * mean_dy_normed) * rstd_of_token).to(x.dtype)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _group_mean(per_channel: Tensor, num_groups: int) -> Tensor:
    """(B, C) -> (B, C): the mean of each channel's group."""
    group_size = per_channel.shape[1] // num_groups
    return per_channel.unflatten(1, (num_groups, group_size)).mean(2).repeat_interleave(group_size, dim=1)
