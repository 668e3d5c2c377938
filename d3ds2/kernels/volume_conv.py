"""Convolutions of a dense volume whose voxels are rows: voxel (x, y, z) is row (x Y + y) Z + z of a matrix.

On CUDA the kernels of volume_conv_triton.py read the neighbours in place; elsewhere the definition runs. None of these
operations has a gradient.

Sizes named in this file:
    V  voxels, X · Y · Z      C, D  channels of the first and the second input      M  channels of the result
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import on_triton

OFFSETS = 27  # the voxel itself and its neighbours, x slowest

Size = tuple[int, int, int]
Norm = tuple[Tensor, Tensor]  # scale and shift of each channel, float32


def rows_are_faster(volume: Tensor) -> bool:
    """Whether a network should run on rows rather than volumes: on Triton, and without a gradient."""
    return on_triton(volume) and not torch.is_grad_enabled()


def volume_conv(
    x: Tensor,
    size: Size,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`conv3d` that keeps the size, of x and y side by side, plus the residual.

    Args:
        x: rows (V, C).
        size: X, Y, Z.
        weight: (M, C + D, 1, 1, 1) or (M, C + D, 3, 3, 3), of the dtype of x.
        bias: (M,) or None.
        y: rows (V, D) or None.
        norm: scale and shift (C + D,) float32; then SiLU(x · scale + shift) is convolved, zero beyond the volume.
        residual: rows (V, M) or None.

    Returns:
        (V, M), dtype of x; summed in at least float32.
    """
    if on_triton(x):
        from .volume_conv_triton import volume_conv_triton

        return volume_conv_triton(x, size, weight, bias, y, norm, residual)
    return volume_conv_reference(x, size, weight, bias, y, norm, residual)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of rows (V, C): two of (C,), float64."""
    if on_triton(x):
        from .volume_conv_triton import channel_moments_triton

        return channel_moments_triton(x)
    return channel_moments_reference(x)


def adaptive_conv(x: Tensor, size: Size, weights: Tensor) -> Tensor:
    """out[n] = Σ_k w[n, k] x[neighbour k of n] / Σ_k |w[n, k]|: rows (V, C) and (V, 27), x slowest -> (V, C)."""
    if on_triton(x):
        from .volume_conv_triton import adaptive_conv_triton

        return adaptive_conv_triton(x, size, weights)
    return adaptive_conv_reference(x, size, weights)


def volume_conv_reference(
    x: Tensor,
    size: Size,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Definition of `volume_conv`."""
    h = _to_volume(x if y is None else torch.cat([x, y], dim=1), size)
    if norm is not None:
        scale, shift = (values[:, None, None, None] for values in norm)
        h = F.silu(h.float() * scale + shift).to(x.dtype)
    out = _to_rows(F.conv3d(h, weight, bias, padding=weight.shape[-1] // 2))
    return out if residual is None else out + residual


def channel_moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `channel_moments`."""
    variance, mean = torch.var_mean(x.double(), dim=0, correction=0)
    return mean, variance


def adaptive_conv_reference(x: Tensor, size: Size, weights: Tensor) -> Tensor:
    """Definition of `adaptive_conv`."""
    shares, padded = _to_volume(F.normalize(weights, p=1.0, dim=1), size), F.pad(_to_volume(x, size), (1,) * 6)
    (X, Y, Z), out = size, torch.zeros_like(padded[:, :, 1:-1, 1:-1, 1:-1])
    for k in range(OFFSETS):
        i, j, l = k // 9, k // 3 % 3, k % 3  # noqa: E741
        out = torch.addcmul(out, shares[:, k : k + 1], padded[:, :, i : i + X, j : j + Y, l : l + Z])
    return _to_rows(out)


def _to_rows(volume: Tensor) -> Tensor:
    """(1, C, X, Y, Z) -> (V, C)."""
    return volume[0].flatten(1).t().contiguous()


def _to_volume(rows: Tensor, size: Size) -> Tensor:
    """(V, C) -> (1, C, X, Y, Z)."""
    return rows.t().unflatten(1, size)[None]
