"""Convolutions of a dense volume whose voxels are rows: voxel (x, y, z) is row (x Y + y) Z + z of a matrix.

On CUDA, the kernels of volume_conv_triton.py read the neighbours where they lie; elsewhere the definitions run. None of
these operations has a gradient.

Sizes named in this file:
    V  voxels, X · Y · Z      C, D  channels of the first and the second input      M  channels of the result
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import has_float64, on_triton

OFFSETS = 27  # from a voxel to itself and its neighbours, x slowest

Size = tuple[int, int, int]
Norm = tuple[Tensor, Tensor]  # scale and shift of each channel, float32


def rows_are_faster(volume: Tensor) -> bool:
    """Return whether rows are the faster form of this volume (B, C, X, Y, Z): on Triton and without a gradient."""
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
    """Convolve x and y, side by side, to a volume of the same size, and add the residual.

    Args:
        x: rows (V, C).
        size: X, Y, Z.
        weight: (M, C + D, 1, 1, 1) or (M, C + D, 3, 3, 3), of the dtype of x.
        bias: (M,) or None.
        y: rows (V, D) or None.
        norm: scale and shift (C + D,) float32, or None. If given, SiLU(input · scale + shift) is convolved, which is
            zero outside the volume.
        residual: rows (V, M) or None.

    Returns:
        (V, M), dtype of x. The kernels sum in float32.
    """
    if on_triton(x):
        from .volume_conv_triton import volume_conv_triton

        return volume_conv_triton(x, size, weight, bias, y, norm, residual)
    return volume_conv_reference(x, size, weight, bias, y, norm, residual)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of each channel of rows (V, C): (C,) each, in float64 where there is it."""
    if on_triton(x):
        from .volume_conv_triton import channel_moments_triton

        return channel_moments_triton(x)
    return channel_moments_reference(x)


def adaptive_conv(x: Tensor, size: Size, weights: Tensor) -> Tensor:
    """Convolve each voxel with weights of its own: out[n] = Σ_k w[n, k] x[neighbour k of n] / Σ_k |w[n, k]|.

    Args:
        x: rows (V, C).
        size: X, Y, Z.
        weights: (V, 27), the x offset slowest.

    Returns:
        (V, C).
    """
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
    """Definition of `volume_conv`: rows (V, C) and (V, D) -> (V, M)."""
    h = _to_volume(x if y is None else torch.cat([x, y], dim=1), size)
    if norm is not None:
        scale, shift = (values[:, None, None, None] for values in norm)
        h = F.silu(h.float() * scale + shift).to(x.dtype)
    out = _to_rows(F.conv3d(h, weight, bias, padding=weight.shape[-1] // 2))
    return out if residual is None else out + residual


def channel_moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `channel_moments`: rows (V, C) -> (C,) each."""
    variance, mean = torch.var_mean(x.double() if has_float64(x.device) else x.float(), dim=0, correction=0)
    return mean, variance


def adaptive_conv_reference(x: Tensor, size: Size, weights: Tensor) -> Tensor:
    """Definition of `adaptive_conv`: rows (V, C) -> (V, C)."""
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
