"""Networks that are on a device only while they run."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from .kernels.devices import copies_in_background


@contextmanager
def on_device(network: nn.Module, device: torch.device | str | None) -> Generator[torch.device]:
    """Bring a network to a device for the block; None leaves it where it is.

    Its weights also stay where they were, so that afterwards nothing is copied back. Gives the device it is on.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if device is None:
        yield tensors[0].device
        return
    in_background = copies_in_background(torch.device(device))
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=in_background)
        yield tensors[0].device
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
