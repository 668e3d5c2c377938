"""Make rendered pictures more like those that people have: photographs whose background was removed imperfectly.

A picture is taken apart into the object and its mask, the object is put before a background, the result is changed as a
camera and a file would, and then cut out with a mask that is a little wrong:

    colours           brightness, contrast, gamma, saturation and tint
    blur, noise, JPEG of the whole picture, so that they also mix object and background at the contour
    mask              shrunk or grown, with a ragged or soft contour, sometimes with a piece missing

A grown mask then shows a fringe of the background. All values are drawn from the generator alone, a row for each
picture, and a share of the pictures stays as it is. None of it comes from the paper. [D: see docs/paper.md]

Sizes: B pictures, S pixels per edge.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.kernels.device_constant import device_constant
from training.losses import DrawRows, draw_all

UNTOUCHED = 0.25  # share of the pictures that stay as they are
PROBABILITIES = {"colors": 0.7, "background": 0.5, "blur": 0.3, "noise": 0.3, "jpeg": 0.5, "mask": 0.6, "hole": 0.08}
BRIGHTNESS, CONTRAST, SATURATION, TINT = 0.3, 0.25, 0.5, 0.08  # largest relative changes
GAMMA = (0.65, 1.5)
BACKGROUND_SPREAD = 0.15  # standard deviation of a background's colours
BLUR = (0.4, 1.6)  # pixels of 224, the standard deviation of the filter
NOISE = (0.005, 0.03)  # standard deviation of a pixel's noise
QUALITY = (25.0, 95.0)  # of the JPEG file
SHIFT = (-0.25, 0.42)  # of the mask's level: below zero it grows, above it shrinks
RAGGED = 0.35  # largest height of the waves in the mask's level
LEAST = 0.04  # of the smoothed mask's level
SOFTNESS = (0.05, 0.45)  # width of the mask's contour, as a share of that of the smoothed mask
MASK_BLUR = 1.8  # pixels of 224; as far as the mask is shrunk or grown
HOLE = 1.7  # a piece is missing where a smooth field of unit variance is higher
PICTURE = 224  # pixels per edge to which the lengths above refer
REACH = 4  # pixels on each side that a blur looks at

LUMA = (  # quantisation tables of the JPEG standard, ITU-T T.81, annex K
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 32),
)
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # ITU-T T.871
FROM_YCC = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
CELL = 8  # pixels along the edge of a JPEG block


class Fields(NamedTuple):
    """Random fields of a batch, and its single numbers."""

    numbers: Tensor  # (B, 24) in [0, 1)
    waves: Tensor  # (B, 1, 28, 28) normal: the contour of the mask
    slow: Tensor  # (B, 4, 5, 5) normal: colours of the background, and missing pieces
    noise: Tensor  # (B, 3, S, S) normal

    @classmethod
    def draw(cls, images: Tensor, generator: torch.Generator, draw_samples: DrawRows) -> "Fields":
        """Draw the fields of pictures (B, 4, S, S)."""
        device, S = generator.device, images.shape[-1]

        def normal(*shape: int) -> Tensor:
            rows = draw_samples(len(images), lambda B: torch.randn((B, *shape), generator=generator, device=device))
            return rows.to(images.device)

        numbers = draw_samples(len(images), lambda B: torch.rand((B, 24), generator=generator, device=device))
        return cls(numbers.to(images.device), normal(1, 28, 28), normal(4, 5, 5), normal(3, S, S))


def make_imperfect(images: Tensor, generator: torch.Generator, draw_samples: DrawRows = draw_all) -> Tensor:
    """Return pictures (B, 4, S, S) in [0, 1], object on white and its mask, as imperfect ones of the same kind.

    `draw_samples` is that of a part of a batch, see `training.data.parts`.
    """
    return change_pictures(images, *Fields.draw(images, generator, draw_samples))


def change_pictures(images: Tensor, numbers: Tensor, waves: Tensor, slow: Tensor, noise: Tensor) -> Tensor:
    """Change pictures (B, 4, S, S) by the values of `Fields`."""
    u = iter(numbers.t()[:, :, None, None, None])  # (B, 1, 1, 1) each
    touched = next(u) >= UNTOUCHED
    happens = {name: next(u) < probability for name, probability in PROBABILITIES.items()}
    S, scale = images.shape[-1], images.shape[-1] / PICTURE

    mask = images[:, 3:]
    color = ((images[:, :3] - 1 + mask) / mask.clamp(min=0.1)).clamp(0, 1)  # without the white at the contour
    color = torch.where(happens["colors"], change_colors(color, [next(u) for _ in range(7)]), color)

    slow = F.interpolate(slow, size=(S, S), mode="bicubic", align_corners=False)
    plain = torch.cat([next(u) for _ in range(3)], dim=1)
    background = (plain + BACKGROUND_SPREAD * slow[:, :3]).clamp(0, 1)
    background = torch.where(happens["background"], background, 1.0)
    scene = mask * color + (1 - mask) * background

    scene = torch.where(happens["blur"], blur(scene, scale * between(BLUR, next(u))), scene)
    scene = torch.where(happens["noise"], (scene + between(NOISE, next(u)) * noise).clamp(0, 1), scene)
    scene = torch.where(happens["jpeg"], jpeg(scene, between(QUALITY, next(u))), scene)

    smooth = blur(mask, torch.full_like(plain[:, :1], MASK_BLUR * scale))
    waves = F.interpolate(waves, size=(S, S), mode="bicubic", align_corners=False)
    level = 0.5 + between(SHIFT, next(u)) + RAGGED * next(u) ** 2 * waves
    softness = between(SOFTNESS, next(u))
    edge = 0.5 * softness + LEAST  # so that the mask is full and empty far from the contour
    wrong = ((smooth - level.clamp(edge, 1 - edge)) / softness + 0.5).clamp(0, 1)
    wrong = torch.where(happens["hole"], wrong * (slow[:, 3:] < HOLE), wrong)
    wrong = torch.where(happens["mask"], wrong, mask)
    made = torch.cat([wrong * scene + (1 - wrong), wrong], dim=1).clamp(0, 1)
    is_seen = wrong.flatten(1).sum(1) > 0.5 * mask.flatten(1).sum(1)  # else too little of a thin object is left
    return torch.where(touched & is_seen[:, None, None, None], made, images)


def between(limits: tuple[float, float], u: Tensor) -> Tensor:
    """Map u (B, 1, 1, 1) in [0, 1) to [low, high)."""
    low, high = limits
    return low + (high - low) * u


def change_colors(color: Tensor, u: list[Tensor]) -> Tensor:
    """Change brightness, contrast, gamma, saturation and tint of (B, 3, S, S); u holds 7 draws (B, 1, 1, 1)."""
    brightness, contrast, saturation = (
        1 + width * (2 * v - 1) for width, v in zip((BRIGHTNESS, CONTRAST, SATURATION), u[:3], strict=True)
    )
    gamma = between((math.log(GAMMA[0]), math.log(GAMMA[1])), u[3]).exp()
    tint = 1 + TINT * (2 * torch.cat(u[4:], dim=1) - 1)
    grey = color.mean(1, keepdim=True)
    color = (grey + saturation * (color - grey)) * brightness * tint
    return ((color - 0.5) * contrast + 0.5).clamp(0, 1) ** gamma


def blur(images: Tensor, deviation: Tensor) -> Tensor:
    """Blur (B, C, S, S) by Gaussians of these standard deviations (B, 1, 1, 1) in pixels; edges are repeated."""
    offsets = torch.arange(-REACH, REACH + 1, device=images.device)
    weights = (-0.5 * (offsets / deviation) ** 2).exp()  # (B, 1, 1, 2 REACH + 1)
    weights = weights / weights.sum(-1, keepdim=True)
    for dim in (2, 3):
        size, padding = images.shape[dim], (0, 0, REACH, REACH) if dim == 2 else (REACH, REACH, 0, 0)
        padded = F.pad(images, padding, mode="replicate")
        shifted = (weights[..., i : i + 1] * padded.narrow(dim, i, size) for i in range(2 * REACH + 1))
        images = sum(shifted, start=torch.zeros_like(images))
    return images


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Return colours (B, 3, S, S) in [0, 1] as a JPEG file of this quality (B, 1, 1, 1) keeps them.

    Chroma stays at full size. The transform, the tables and their scaling are those of the standard and of libjpeg.
    """
    S, device = images.shape[-1], images.device
    more = -S % CELL
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[..., None]  # (B, 1, 1, 1, 1)
    tables = device_constant((LUMA, CHROMA, CHROMA), device, torch.float32)[:, None, None]
    shift = device_constant((128.0, 0.0, 0.0), device, torch.float32)[:, None, None]  # of luma from zero
    steps = ((tables * percent + 50) / 100).floor().clamp(1, 255)  # (B, 3, 1, 1, 64)

    levels = F.pad(mix(images * 255, TO_YCC).round() - shift, (0, more, 0, more), "replicate")
    cells = levels.unflatten(3, (-1, CELL)).unflatten(2, (-1, CELL)).transpose(3, 4).flatten(4)  # (B, 3, n, n, 64)
    cosines = cosine_transform(device)
    kept = (cells @ cosines.t() / steps).round() * steps
    levels = (kept @ cosines).unflatten(4, (CELL, CELL)).transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :S, :S]
    return (mix(levels + shift, FROM_YCC) / 255).clamp(0, 1)


def mix(colors: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Apply a matrix (3, 3) to the channels of (B, 3, S, S)."""
    r, g, b = colors.unbind(1)
    return torch.stack([row[0] * r + row[1] * g + row[2] * b for row in matrix], dim=1)


def cosine_transform(device: torch.device) -> Tensor:
    """The cosine transform of a JPEG block as one matrix, rows first: (64, 64), orthogonal."""
    k = torch.arange(CELL, device=device)
    line = torch.cos(torch.pi / CELL * (k + 0.5) * k[:, None]) * (2 / CELL) ** 0.5
    line = torch.cat([line[:1] / 2**0.5, line[1:]])
    return torch.kron(line, line)
