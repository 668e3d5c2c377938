"""The abilities of a device: the only place that asks whether Triton or a GPU is there."""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # torch for Windows or macOS comes without


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor: it lies on a GPU, and Triton is installed."""
    return x.is_cuda and HAS_TRITON


def half_on_triton(x: Tensor) -> bool:
    """`on_triton` for kernels that compute in float32 or less: a tensor of float64 keeps the definition."""
    return on_triton(x) and x.dtype != torch.float64


def has_flash_attention(q: Tensor) -> bool:
    """Whether torch's FlashAttention takes these queries (..., D): in half precision, on Ampere or newer."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
