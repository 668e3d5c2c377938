"""Sines and cosines that tell a transformer where a token lies."""

from functools import cache

import torch
from torch import Tensor

from ..kernels.device_constant import device_constant


def absolute_position_embedding(positions: Tensor, channels: int) -> Tensor:
    """Embed points by sines and cosines of each axis, at F = `channels // 3 // 2` frequencies 10000^(-i/F).

    Args:
        positions: coordinates (..., 3).
        channels: width C. The last channels, C - 6 F, are zero.

    Returns:
        Embeddings (..., C), float32: sines then cosines of x, then those of y, then those of z.
    """
    frequencies = device_constant(_frequencies(channels // 3 // 2), positions.device, torch.float32)
    angles = positions.float()[..., None] * frequencies  # (..., 3, F)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., 6 F)
    return torch.nn.functional.pad(embedding, (0, channels - embedding.shape[-1]))


@cache
def _frequencies(count: int) -> tuple[float, ...]:
    """The frequencies, computed in float64 and rounded to float32: (F,). Some devices have no float64."""
    exponent = torch.arange(count, dtype=torch.float64, device="cpu") / count
    return tuple(torch.pow(10000.0, -exponent).float().tolist())
