"""The refiners' U-Net without gradients, with the voxels of a patch as rows (V, C); refiner.py is the definition.

Nearly all memory is in the narrow levels, which the convolutions of volume_conv.py read in place.

Sizes named in this file:
    V  voxels of one patch, X · Y · Z      C  channels
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.volume_conv import Norm, Size, adaptive_conv, channel_moments, volume_conv

MAX_FUSED_CHANNELS = 64  # of a convolution's result; for wider ones, the activations before it are stored
SLAB_BYTES = 64 << 20  # rows computed at a time, in float32


def unet_rows(unet: nn.Module, x: Tensor, y: Tensor | None, size: Size) -> Tensor:
    """Apply `UNet.forward` to x and y (V, ·) side by side -> (V, widths[0])."""
    h = _conv(x, size, unet.input_conv, y)
    skips = [h]
    for level, blocks in enumerate(unet.down_blocks):
        for block in blocks:
            h = _res_block(block, h, size)
            skips.append(h)
        if level < len(unet.downsamples):
            h, size = _halve(h, size, unet.downsamples[level])
            skips.append(h)
    for block in unet.middle_blocks:
        h = _res_block(block, h, size)
    for level, blocks in enumerate(unet.up_blocks):
        for block in blocks:
            h = _res_block(block, h, size, skips.pop())
        if level < len(unet.upsamples):
            h, size = _double(h, size, unet.upsamples[level])
    return _silu_(h, _norm(unet.out_norm, h))


def adaptive_rows(module: nn.Module, x: Tensor, guide: Tensor, size: Size, steps: int) -> Tensor:
    """Apply `AdaptiveConv.forward`: x (V, ·) and guide (V, C) -> the shape of x."""
    weights = _conv(_conv(guide, size, module.hidden_conv).relu_(), size, module.weight_conv)
    for _ in range(steps):
        x = adaptive_conv(x, size, weights)
    return x


def conv_rows(x: Tensor, size: Size, conv: nn.Conv3d) -> Tensor:
    """Apply a convolution that keeps the size: (V, C) -> (V, ·)."""
    return _conv(x, size, conv)


def _conv(
    x: Tensor, size: Size, conv: nn.Conv3d, y: Tensor | None = None, norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return volume_conv(x, size, conv.weight, conv.bias, y, norm, residual)


def _res_block(block: nn.Module, x: Tensor, size: Size, y: Tensor | None = None) -> Tensor:
    """Apply `ResBlock.forward` to x and y side by side."""
    shortcut = x if isinstance(block.shortcut, nn.Identity) else _conv(x, size, block.shortcut, y)
    h = _norm_conv(block.norm1, block.conv1, x, y, size)
    return _norm_conv(block.norm2, block.conv2, h, None, size, shortcut)


def _norm_conv(
    norm: nn.GroupNorm, conv: nn.Conv3d, x: Tensor, y: Tensor | None, size: Size, residual: Tensor | None = None
) -> Tensor:
    """Apply group norm, SiLU and a convolution; not fused if wide, where activations would be computed too often."""
    scale, shift = _norm(norm, x, y)
    if len(conv.weight) <= MAX_FUSED_CHANNELS:
        return _conv(x, size, conv, y, (scale, shift), residual)
    C = x.shape[1]
    x = _silu_(x.clone(), (scale[:C], shift[:C]))
    if y is not None:
        y = _silu_(y.clone(), (scale[C:], shift[C:]))
    return _conv(x, size, conv, y, residual=residual)


def _norm(norm: nn.GroupNorm, x: Tensor, y: Tensor | None = None) -> Norm:
    """Return the scale and shift of each channel for a group norm of x and y side by side."""
    parts = [channel_moments(part) for part in (x, y) if part is not None]
    mean, variance = (torch.cat(values).unflatten(0, (norm.num_groups, -1)) for values in zip(*parts, strict=True))
    group_mean = mean.mean(1, keepdim=True)
    group_variance = (variance + (mean - group_mean).square()).mean(1, keepdim=True)
    rstd = (group_variance + norm.eps).rsqrt()
    scale = (rstd * norm.weight.to(mean.dtype).view_as(mean)).flatten()
    shift = norm.bias.to(mean.dtype) - (group_mean.expand_as(mean).flatten() * scale)
    return scale.float(), shift.float()


def _silu_(x: Tensor, norm: Norm) -> Tensor:
    """Apply SiLU(x · scale + shift) in place."""
    for rows in x.split(_rows(x.shape[1])):
        rows.copy_(F.silu(torch.addcmul(norm[1], rows.float(), norm[0]), inplace=True))
    return x


def _halve(x: Tensor, size: Size, conv: nn.Conv3d) -> tuple[Tensor, Size]:
    """Apply a convolution of kernel and stride 2; returns its rows and size."""
    (X, Y, Z), C = size, conv.weight.shape[1]
    weight = conv.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)  # (8 C, ·)
    cells = x.view(X // 2, 2, Y // 2, 2, Z // 2, 2, C).permute(0, 2, 4, 1, 3, 5, 6)
    layers = max(1, _rows(C) // (2 * Y * Z))
    out = [torch.addmm(conv.bias, some.reshape(-1, 8 * C), weight) for some in cells.split(layers)]
    return torch.cat(out), (X // 2, Y // 2, Z // 2)


def _double(x: Tensor, size: Size, conv: nn.ConvTranspose3d) -> tuple[Tensor, Size]:
    """Apply a transposed convolution of kernel and stride 2; returns its rows and size."""
    (X, Y, Z), (C, M) = size, conv.weight.shape[:2]
    weight = conv.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (C, 8 M), children i, j, k
    out = x.new_empty(8 * len(x), M)
    cells = out.view(X, 2, Y, 2, Z, 2, M).permute(0, 2, 4, 1, 3, 5, 6)
    layers = max(1, _rows(8 * M) // (Y * Z))
    for some, to in zip(x.view(X, Y * Z, C).split(layers), cells.split(layers), strict=True):
        to.copy_(torch.addmm(conv.bias.repeat(8), some.flatten(0, 1), weight).view(to.shape))
    return out, (2 * X, 2 * Y, 2 * Z)


def _rows(channels: int) -> int:
    """Return how many rows of so many channels are computed at a time."""
    return max(1, SLAB_BYTES // (4 * channels))
