"""Layer norm with adaptive modulation and the gated residual, around the blocks of a diffusion transformer.

On CUDA each is one pass over the tokens, forward and backward, by the kernels of modulation_triton.py. Elsewhere, and
in float64, the definitions run.

Sizes named in this file:
    N  tokens, all samples packed      B  samples      C  hidden size
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import half_on_triton
from .ragged import Ragged
from .segment_sum import per_token


def modulated_norm(h: Tensor, shift: Tensor, scale: Tensor, samples: Ragged, eps: float) -> Tensor:
    """norm(h) (1 + scale) + shift: h (N, C), the rows of `samples`, shift and scale (B, C) -> (N, C).

    Under autocast the result is float32, as that of torch's layer norm is.
    """
    if not half_on_triton(h) or torch.compiler.is_compiling():  # the compiler fuses its own
        return modulated_norm_reference(h, shift, scale, samples, eps)
    from .modulation_triton import modulated_norm_triton

    dtype = torch.promote_types(_norm_dtype(h), torch.promote_types(shift.dtype, scale.dtype))
    return modulated_norm_triton(h, shift, scale, samples, eps, dtype)


def affine_norm(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(h) weight + bias: h (..., C), weight and bias (C,) -> the shape of h."""
    if not half_on_triton(h) or torch.compiler.is_compiling():
        return affine_norm_reference(h, weight, bias, eps)
    from .modulation_triton import affine_norm_triton

    return affine_norm_triton(h, weight, bias, eps, _norm_dtype(h))


def gated_sum(h: Tensor, gate: Tensor, x: Tensor, samples: Ragged) -> Tensor:
    """h + gate x: h and x (N, C), the rows of `samples`, gate (B, C) -> (N, C), in the widest dtype."""
    if not half_on_triton(h) or torch.compiler.is_compiling():
        return gated_sum_reference(h, gate, x, samples)
    from .modulation_triton import gated_sum_triton

    dtype = torch.promote_types(h.dtype, torch.promote_types(gate.dtype, x.dtype))
    return gated_sum_triton(h, gate, x, samples, dtype)


def modulated_norm_reference(h: Tensor, shift: Tensor, scale: Tensor, samples: Ragged, eps: float) -> Tensor:
    """Definition of `modulated_norm`."""
    normed = F.layer_norm(h, h.shape[-1:], eps=eps)  # statistics in float32
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


def gated_sum_reference(h: Tensor, gate: Tensor, x: Tensor, samples: Ragged) -> Tensor:
    """Definition of `gated_sum`."""
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


def _norm_dtype(h: Tensor) -> torch.dtype:
    return torch.float32 if torch.is_autocast_enabled("cuda") else h.dtype
