"""RMS norm of each head of queries or keys.

On CUDA it is one pass, forward and backward, by the kernels of head_norm_triton.py. Elsewhere the definition runs.

Sizes named in this file:
    H  heads      D  channels per head
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import half_on_triton


def head_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / ‖x‖ · √D · gamma in float32: x (..., H, D), gamma (H, D) -> (..., H, D) in the dtype of x."""
    if not half_on_triton(x) or torch.compiler.is_compiling():
        return head_rms_norm_reference(x, gamma)
    from .head_norm_triton import head_rms_norm_triton

    return head_rms_norm_triton(x, gamma)


def head_rms_norm_reference(x: Tensor, gamma: Tensor) -> Tensor:
    """Definition of `head_rms_norm`."""
    return (F.normalize(x.float(), dim=-1) * gamma.float() * x.shape[-1] ** 0.5).to(x.dtype)
