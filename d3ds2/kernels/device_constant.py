"""Small tables of numbers, copied to a device once, because the host waits for the device at every copy."""

from functools import cache

import torch
from torch import Tensor


def device_constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return a (nested) tuple of numbers as a tensor. All callers share the tensor, so none may write to it."""
    return _made(values, device, dtype)


@cache
def _made(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else a caller that trains could not use it
        return torch.tensor(values, dtype=dtype, device=device)
