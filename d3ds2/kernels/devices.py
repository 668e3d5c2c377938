"""The abilities of a device: the only place that asks whether Triton or a GPU is there."""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # torch for Windows or macOS comes without
HAS_SPCONV = find_spec("spconv") is not None  # its CPU build included


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor: it lies on a GPU, and Triton is installed."""
    return x.is_cuda and HAS_TRITON


def on_spconv(x: Tensor) -> bool:
    """Whether spconv may run on this tensor: it lies on a GPU without Triton, and spconv is installed."""
    return x.is_cuda and HAS_SPCONV and not on_triton(x)


def half_on_triton(x: Tensor) -> bool:
    """`on_triton` for kernels that compute in float32 or less: a tensor of float64 keeps the definition."""
    return on_triton(x) and x.dtype != torch.float64
