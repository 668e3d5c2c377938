"""IMAGE and MASK sockets <-> Pillow's pictures. Inputs are copied, never changed."""

import numpy as np
import torch
from PIL import Image


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Return an IMAGE (B, H, W, 3 or 4) in [0, 1] as RGB or RGBA pictures. Raises ValueError for another shape."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise ValueError(f"expected an IMAGE (batch, height, width, 3 or 4), got {tuple(images.shape)}")
    return [Image.fromarray(array) for array in _to_8_bit(images)]


def to_masks(masks: torch.Tensor) -> list[Image.Image]:
    """Return a MASK (B, H, W) or (H, W) in [0, 1] as pictures of mode L. Raises ValueError for another shape."""
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(f"expected a MASK (batch, height, width), got {tuple(masks.shape)}")
    return [Image.fromarray(array) for array in _to_8_bit(masks)]


def to_images(pictures: list[Image.Image]) -> torch.Tensor:
    """Return pictures of one size and mode as IMAGE (B, H, W, C), or MASK (B, H, W) for mode L, float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255


def _to_8_bit(values: torch.Tensor) -> np.ndarray:
    return (values.detach().float().cpu().nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
