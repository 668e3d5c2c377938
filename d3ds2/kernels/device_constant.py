"""Small integer tables on a device, copied there once: every copy from the host makes the host wait for the device."""

from functools import cache

import torch
from torch import Tensor


def device_constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """The tensor of (nested tuples of) numbers, shared by all callers: not to be written to."""
    return _made(values, device, dtype)


@cache
def _made(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a later caller may train
        return torch.tensor(values, dtype=dtype, device=device)
