"""Sines and cosines that tell a transformer where a token lies."""

from functools import cache

import torch
from torch import Tensor

from ..kernels.devices import has_float64


def absolute_position_embedding(positions: Tensor, channels: int) -> Tensor:
    """Embed points by sines and cosines of each axis, at F = `channels // 3 // 2` frequencies 10000^(-i/F).

    Args:
        positions: coordinates (..., 3).
        channels: width C. The last channels, C - 6 F, are zero.

    Returns:
        Embeddings (..., C), float32: sines then cosines of x, then those of y, then those of z.
    """
    frequencies = _frequencies(channels // 3 // 2, positions.device)
    angles = positions.float()[..., None] * frequencies  # (..., 3, F)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., 6 F)
    return torch.nn.functional.pad(embedding, (0, channels - embedding.shape[-1]))


@cache
@torch.inference_mode(False)  # else a caller that trains could not use a result from sampling
def _frequencies(count: int, device: torch.device) -> Tensor:
    """The frequencies, (F,) float32, rounded from float64: a device without it gets them from the CPU."""
    where = device if has_float64(device) else torch.device("cpu")
    exponent = torch.arange(count, dtype=torch.float64, device=where) / count
    return torch.pow(10000.0, -exponent).float().to(device)
