"""Sines and cosines that tell a transformer where a token lies."""

import torch
from torch import Tensor


def absolute_position_embedding(positions: Tensor, channels: int) -> Tensor:
    """Embed points by sines and cosines of each axis, at F = `channels // 3 // 2` frequencies 10000^(-i/F).

    Args:
        positions: coordinates (..., 3).
        channels: width C. The last channels, C - 6 F, are zero.

    Returns:
        Embeddings (..., C), float32: sines then cosines of x, then those of y, then those of z.
    """
    num_frequencies = channels // 3 // 2
    exponent = torch.arange(num_frequencies, dtype=torch.float64, device=positions.device) / num_frequencies
    frequencies = torch.pow(10000.0, -exponent).float()
    angles = positions.float()[..., None] * frequencies  # (..., 3, F)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., 6 F)
    return torch.nn.functional.pad(embedding, (0, channels - embedding.shape[-1]))
