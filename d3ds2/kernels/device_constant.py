"""Small integer tables that are copied to a device once: with every copy, the host waits for the device."""

from functools import cache

import torch
from torch import Tensor


def device_constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return the tensor of a (nested) tuple of numbers. All callers share it: never write to it."""
    return _made(values, device, dtype)


@cache
def _made(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a later caller may train
        return torch.tensor(values, dtype=dtype, device=device)
