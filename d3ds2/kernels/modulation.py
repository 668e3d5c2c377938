"""The gated residual and its layer norm with adaptive modulation, between the layers of a diffusion transformer.

On CUDA each is one pass over the tokens, forward and backward, by the kernels of modulation_triton.py. Elsewhere, and
in float64, the definitions run.

Sizes named in this file:
    N  tokens, all samples packed      B  samples      C  hidden size      L  tokens of a dense sample
"""

from functools import cache, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from .device_constant import device_constant
from .devices import autocast_dtype, half_on_triton
from .ragged import Ragged
from .segment_sum import per_token


def sum_and_norm(
    h: Tensor, gate: Tensor | None, x: Tensor | None, shift: Tensor, scale: Tensor, samples: Ragged | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Add x to the residual h, and norm the sum: the two steps between two layers of a block.

    Args:
        h: the residual (N, C), the rows of `samples`; without them (B, L, C), and so are x and the results.
        gate: factor on x in each sample (B, C); None is 1.
        x: what is added (N, C); None adds nothing.
        shift, scale: modulation of the norm in each sample, (B, C) each.
        samples: the rows of each sample; None where all have L rows.
        eps: number added to the variances.

    Returns:
        h + gate x (N, C), in the widest dtype of the three, and norm(h + gate x) (1 + scale) + shift (N, C). Under
        autocast the kernel gives the norm in the dtype of autocast, which is what linear layers take. Take both, also
        where nothing is added: then the backward pass adds the two gradients of h on the way.
    """
    if not half_on_triton(h) or torch.compiler.is_compiling():  # the compiler fuses its own
        return sum_and_norm_reference(h, gate, x, shift, scale, samples, eps)
    from .modulation_triton import sum_and_norm_triton

    total_dtype = _widest(h, gate, x)
    dtype = autocast_dtype(h.device) or torch.promote_types(total_dtype, _widest(shift, scale))
    rows, added, segments = _rows(h), None if x is None else _rows(x), _segments(h, samples)
    results = sum_and_norm_triton(rows, gate, added, shift, scale, segments, eps, total_dtype, dtype)
    return _shaped(results[0], h), _shaped(results[1], h)


def sum_and_affine_norm(
    h: Tensor, gate: Tensor | None, x: Tensor | None, weight: Tensor, bias: Tensor, samples: Ragged | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`sum_and_norm`, but the norm of the sum is multiplied by `weight` (C,), and `bias` (C,) is added to it."""
    if not half_on_triton(h) or torch.compiler.is_compiling():
        return sum_and_affine_norm_reference(h, gate, x, weight, bias, samples, eps)
    from .modulation_triton import sum_and_norm_triton

    rows, added, segments = _rows(h), None if x is None else _rows(x), _segments(h, samples)
    total_dtype, every = _widest(h, gate, x), (len(segments), -1)
    dtype = autocast_dtype(h.device) or total_dtype
    results = sum_and_norm_triton(
        rows, gate, added, bias.expand(every), weight.expand(every), segments, eps, total_dtype, dtype, affine=True
    )
    return _shaped(results[0], h), _shaped(results[1], h)


def affine_norm(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(h) weight + bias: h (..., C), weight and bias (C,) -> the shape of h; dtypes as in `sum_and_norm`."""
    if not half_on_triton(h) or torch.compiler.is_compiling():
        return affine_norm_reference(h, weight, bias, eps)
    from .modulation_triton import affine_norm_triton

    return affine_norm_triton(h, weight, bias, eps, autocast_dtype(h.device) or h.dtype)


def gated_sum(h: Tensor, gate: Tensor, x: Tensor, samples: Ragged | None) -> Tensor:
    """h + gate x: h and x (N, C), the rows of `samples`, gate (B, C) -> (N, C), in the widest dtype.

    Without samples h and x are (B, L, C), and so is the result.
    """
    if not half_on_triton(h) or torch.compiler.is_compiling():
        return gated_sum_reference(h, gate, x, samples)
    from .modulation_triton import gated_sum_triton

    out = gated_sum_triton(_rows(h), gate, _rows(x), _segments(h, samples), _widest(h, gate, x))
    return _shaped(out, h)


def _segments(h: Tensor, samples: Ragged | None) -> Ragged:
    return _equal_samples(len(h), h.shape[1], h.device) if samples is None else samples


@cache
def _equal_samples(B: int, L: int, device: torch.device) -> Ragged:
    return Ragged(device_constant(tuple(range(0, (B + 1) * L, L)) if L else (0,) * (B + 1), device), B * L)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.flatten(0, 1)


def _shaped(rows: Tensor, h: Tensor) -> Tensor:
    return rows if h.ndim == 2 else rows.view(h.shape)


def sum_and_norm_reference(
    h: Tensor, gate: Tensor | None, x: Tensor | None, shift: Tensor, scale: Tensor, samples: Ragged | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Definition of `sum_and_norm`; torch's layer norm gives float32 under autocast."""
    total = _sum(h, gate, x, samples)
    return total, modulated_norm_reference(total, shift, scale, samples, eps)


def sum_and_affine_norm_reference(
    h: Tensor, gate: Tensor | None, x: Tensor | None, weight: Tensor, bias: Tensor, samples: Ragged | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Definition of `sum_and_affine_norm`."""
    total = _sum(h, gate, x, samples)
    return total, affine_norm_reference(total, weight, bias, eps)


def modulated_norm_reference(h: Tensor, shift: Tensor, scale: Tensor, samples: Ragged | None, eps: float) -> Tensor:
    """norm(h) (1 + scale) + shift: h (N, C), the rows of `samples`, shift and scale (B, C) -> (N, C)."""
    normed = F.layer_norm(h, h.shape[-1:], eps=eps)  # statistics in float32
    if samples is None:
        return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])
    if _expands(samples):
        return torch.addcmul(per_token(shift, samples), normed, 1 + per_token(scale, samples))
    dtype = torch.promote_types(normed.dtype, torch.promote_types(shift.dtype, scale.dtype))
    out = normed.to(dtype)
    for b, rows in enumerate(out.split(samples.lengths)):
        torch.addcmul(shift[b], rows, 1 + scale[b], out=rows)
    return out


def affine_norm_reference(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Definition of `affine_norm`."""
    return F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps)


def gated_sum_reference(h: Tensor, gate: Tensor, x: Tensor, samples: Ragged | None) -> Tensor:
    """Definition of `gated_sum`."""
    if samples is None:
        return h + gate[:, None] * x
    if _expands(samples):
        return torch.addcmul(h, per_token(gate, samples), x)
    dtype = torch.promote_types(h.dtype, torch.promote_types(gate.dtype, x.dtype))
    out = torch.empty(h.shape, dtype=dtype, device=h.device)
    parts = zip(out.split(samples.lengths), h.split(samples.lengths), x.split(samples.lengths), strict=True)
    for b, (rows, residual, added) in enumerate(parts):
        torch.addcmul(residual, gate[b], added, out=rows)
    return out


def _expands(samples: Ragged) -> bool:
    """Whether to give every token the row of its sample: one operation, which a gradient and a compiler can follow.

    Else samples are taken in turn, without (N, C) copies of their rows.
    """
    return len(samples) == 1 or torch.is_grad_enabled() or torch.compiler.is_compiling()


def _sum(h: Tensor, gate: Tensor | None, x: Tensor | None, samples: Ragged | None) -> Tensor:
    if x is None:
        return h
    return h + x if gate is None else gated_sum_reference(h, gate, x, samples)


def _widest(*tensors: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))
