"""The two refiners of the released models: dense U-Nets on patches of the decoded SDF volume.

`Refiner` computes new distances for every voxel of a patch from the decoder's distances and features. `SignRefiner`
only decides whether a voxel is outside (+1) or inside (-1). Both have the same U-Net. refined_blocks.py runs them over
a volume. On CUDA and without gradients, refiner_rows.py computes the same with voxels as rows.

Sizes named in this file:
    B  patches      P  voxels along the edge of a patch      C  channels      D  channels of the decoder's features
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.volume_conv import OFFSETS, Size, rows_are_faster
from .refiner_rows import adaptive_rows, conv_rows, unet_rows
from .sizes import check_sizes

GROUPS = 4  # of every group norm
ADAPTIVE_STEPS = 3  # times an adaptive convolution is applied
SLAB_BYTES = 64 << 20  # of input and output of a convolution at a time, without gradients: cuDNN copies its input


@dataclass(frozen=True)
class RefinerConfig:
    """Sizes of a refiner; the defaults are those of the released 512³ one.

    `widths` are the channels of the levels; each level has half the resolution of the one before. A level has `layers`
    residual blocks on the way down and one more on the way up; the middle has `middle_layers` + 1. The network was
    trained on patches of `patch_size` P, and its norms average over a patch.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    widths: tuple[int, ...] = (8, 32, 128, 512)
    layers: int = 2
    middle_layers: int = 2
    patch_size: int = 192
    feature_channels: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON holds lists
        check_sizes(self)
        if not self.widths or any(width % GROUPS for width in self.widths):
            raise ValueError(f"expected widths divisible by {GROUPS}, at least one, got {self.widths}")
        if self.patch_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"expected a patch_size that halves {len(self.widths) - 1} times, got {self.patch_size}")


@dataclass(frozen=True)
class SignRefinerConfig(RefinerConfig):
    """Sizes of a sign refiner; the defaults are those of the released 1024³ one, which reads no features."""

    patch_size: int = 256


class ResBlock(nn.Module):
    """Two normed convolutions beside a skip: (B, in_channels, P, P, P) -> (B, out_channels, P, P, P)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(_norm_silu(x, self.norm1))

    def residual(self, normed: Tensor) -> Tensor:
        return self.finish(_conv(normed, self.conv1))

    def finish(self, h: Tensor) -> Tensor:
        """Apply the layers after the first convolution; overwrites h."""
        return _conv(_norm_silu(h, self.norm2, overwrite=True), self.conv2)

    def forward_cat(self, h: Tensor, skip: Tensor, upsample: nn.ConvTranspose3d | None) -> Tensor:
        """Apply `forward` to the upsampled h and skip side by side.

        Joined, they would be the largest tensor of the network. So without gradients they are joined for one group of
        the norm at a time, and the convolutions are summed over the groups.
        """
        if torch.is_grad_enabled():
            joined = torch.cat([h if upsample is None else upsample(h), skip], dim=1)
            return self(joined)  # pyrefly: ignore[not-callable]: nn.Module, which has __call__, is Any to it
        size = self.norm1.num_channels // GROUPS
        hidden = shortcut = None
        for first in range(0, self.norm1.num_channels, size):
            some = slice(first, first + size)
            x = _channels(h, skip, upsample, first, first + size)
            shortcut = _conv(x, self.shortcut, some, shortcut)
            x = F.group_norm(x, 1, self.norm1.weight[some], self.norm1.bias[some], self.norm1.eps)
            hidden = _conv(F.silu(x, inplace=True), self.conv1, some, hidden)
            del x
        return self.finish(hidden).add_(shortcut)


class UNet(nn.Module):
    """(B, in_channels, P, P, P) -> (B, widths[0], P, P, P)."""

    def __init__(self, in_channels: int, config: RefinerConfig):
        super().__init__()
        widths, layers = config.widths, config.layers
        levels = range(len(widths))
        self.input_conv = nn.Conv3d(in_channels, widths[0], 3, padding=1)
        skips, width = [widths[0]], widths[0]
        self.down_blocks, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for level in levels:
            blocks = [ResBlock(width if i == 0 else widths[level], widths[level]) for i in range(layers)]
            self.down_blocks.append(nn.ModuleList(blocks))
            width = widths[level]
            skips += [width] * layers
            if level < levels[-1]:
                self.downsamples.append(nn.Conv3d(width, width, 2, stride=2))
                skips.append(width)
        self.middle_blocks = nn.ModuleList(ResBlock(width, width) for _ in range(config.middle_layers + 1))
        self.up_blocks, self.upsamples = nn.ModuleList(), nn.ModuleList()
        for level in reversed(levels):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(ResBlock(width + skips.pop(), widths[level]))
                width = widths[level]
            self.up_blocks.append(nn.ModuleList(blocks))
            if level > 0:
                self.upsamples.append(nn.ConvTranspose3d(width, width, 2, stride=2))
        self.out_norm = nn.GroupNorm(GROUPS, widths[0])

    def forward(self, x: Tensor) -> Tensor:
        h = _conv(x, self.input_conv)
        skips = [h]
        for level, blocks in enumerate(self.down_blocks):
            for block in blocks:
                h = block(h)
                skips.append(h)
            if level < len(self.downsamples):
                h = self.downsamples[level](h)
                skips.append(h)
        for block in self.middle_blocks:
            h = block(h)
        upsample = None
        for blocks, after in zip(self.up_blocks, [*self.upsamples, None], strict=True):
            for block in blocks:
                h = block.forward_cat(h, skips.pop(), upsample)
                upsample = None
            upsample = after
        return _norm_silu(h, self.out_norm, overwrite=True)


class AdaptiveConv(nn.Module):
    """A 3³ convolution whose weights differ from voxel to voxel but not between channels, applied three times.

    The weights (B, 27, P, P, P), x slowest, follow from `guide` (B, C, P, P, P); their absolute values sum to one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.hidden_conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.weight_conv = nn.Conv3d(channels, OFFSETS, 3, padding=1, bias=False)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        weights = _conv(F.relu(_conv(guide, self.hidden_conv)), self.weight_conv)
        weights = F.normalize(weights, p=1.0, dim=1)  # (B, 27, P, P, P)
        X, Y, Z = x.shape[2:]
        for _ in range(ADAPTIVE_STEPS):
            padded = F.pad(x, (1,) * 6)
            x = torch.zeros_like(x)
            for k in range(OFFSETS):
                i, j, l = k // 9, k // 3 % 3, k % 3  # noqa: E741
                x = torch.addcmul(x, weights[:, k : k + 1], padded[:, :, i : i + X, j : j + Y, l : l + Z])
        return x


class Refiner(nn.Module):
    """Better distances than the decoder's: the released `Voxel_RefinerXL`."""

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        C, D = config.widths[0], config.feature_channels
        self.input_conv = nn.Conv3d(1, C, 3, padding=1)
        layers = [layer for _ in range(3) for layer in (nn.Linear(D, D), nn.ReLU())]
        self.feature_mlp = nn.Sequential(*layers, nn.Linear(D, C))
        self.unet = UNet(2 * C, config)
        self.adaptive1 = AdaptiveConv(C)
        self.middle_conv = nn.Conv3d(C, C, 3, padding=1)
        self.adaptive2 = AdaptiveConv(C)
        self.output_conv = nn.Conv3d(C, 1, 3, padding=1)
        self.adaptive3 = AdaptiveConv(C)

    def forward(self, sdf: Tensor, embedded: Tensor) -> Tensor:
        """Refine patches.

        Args:
            sdf: (B, 1, P, P, P) distances over the band, 1 where nothing was decoded.
            embedded: (B, C, P, P, P) from `embed_features`; where nothing was decoded, its result for zeros.

        Returns:
            (B, 1, P, P, P) in (-1, 1), negative inside.
        """
        if rows_are_faster(sdf):
            return _volumes(sdf, embedded, run=self._forward_rows)
        h = self.unet(torch.cat([_conv(sdf, self.input_conv), embedded], dim=1))
        h = self.adaptive1(h, h)
        h = _conv(h, self.middle_conv)
        h = self.adaptive2(h, h)
        return self.adaptive3(self.output_conv(h), h).tanh()

    def _forward_rows(self, size: Size, sdf: Tensor, embedded: Tensor) -> Tensor:
        """`forward` of one patch: (V, 1) and (V, C) -> (V, 1)."""
        h = unet_rows(self.unet, conv_rows(sdf, size, self.input_conv), embedded, size)
        h = adaptive_rows(self.adaptive1, h, h, size, ADAPTIVE_STEPS)
        h = conv_rows(h, size, self.middle_conv)
        h = adaptive_rows(self.adaptive2, h, h, size, ADAPTIVE_STEPS)
        return adaptive_rows(self.adaptive3, conv_rows(h, size, self.output_conv), h, size, ADAPTIVE_STEPS).tanh_()

    def embed_features(self, features: Tensor) -> Tensor:
        """Embed the decoder's features of single voxels, (N, D) -> (N, C); a voxel without any counts as zeros."""
        return self.feature_mlp(features)


class SignRefiner(nn.Module):
    """Signs outside and inside from the decoder's distances: the released `Voxel_RefinerXL_sign`."""

    def __init__(self, config: SignRefinerConfig):
        super().__init__()
        self.config = config
        C = config.widths[0]
        self.input_conv = nn.Conv3d(1, C, 3, padding=1)
        self.unet = UNet(C, config)
        self.output_conv = nn.Conv3d(C, 1, 3, padding=1)

    def forward(self, sdf: Tensor) -> Tensor:
        """sdf (B, 1, P, P, P), as `Refiner` takes it -> logits (B, 1, P, P, P), at least 0 outside."""
        if rows_are_faster(sdf):
            return _volumes(sdf, run=self._forward_rows)
        return self.output_conv(self.unet(_conv(sdf, self.input_conv)))

    def _forward_rows(self, size: Size, sdf: Tensor) -> Tensor:
        """`forward` of one patch: (V, 1) -> (V, 1)."""
        return conv_rows(
            unet_rows(self.unet, conv_rows(sdf, size, self.input_conv), None, size), size, self.output_conv
        )


def _volumes(*volumes: Tensor, run: Callable) -> Tensor:
    """Apply run(size, rows (V, C) of each volume) to each patch of volumes (B, C, X, Y, Z) -> (B, 1, X, Y, Z)."""
    size = tuple(volumes[0].shape[2:])
    patches = zip(*volumes, strict=True)
    made = [run(size, *(x.flatten(1).t().contiguous() for x in patch)).view(1, *size) for patch in patches]
    return torch.stack(made)


def _norm_silu(x: Tensor, norm: nn.GroupNorm, overwrite: bool = False) -> Tensor:
    """Return SiLU of the normed x. Without gradients, `overwrite` writes it into x, a group at a time."""
    if torch.is_grad_enabled() or not overwrite:
        return F.silu(norm(x), inplace=not torch.is_grad_enabled())
    parts = (tensor.chunk(norm.num_groups, dim) for tensor, dim in ((x, 1), (norm.weight, 0), (norm.bias, 0)))
    for group, weight, bias in zip(*parts, strict=True):
        group.copy_(F.silu(F.group_norm(group, 1, weight, bias, norm.eps), inplace=True))
    return x


def _channels(h: Tensor, skip: Tensor, upsample: nn.ConvTranspose3d | None, first: int, last: int) -> Tensor:
    """Return channels first <= c < last of the upsampled h and skip side by side."""
    C = h.shape[1] if upsample is None else upsample.out_channels
    parts = []
    if first < C:
        some = slice(first, min(last, C))
        if upsample is None:
            parts.append(h[:, some])
        else:
            parts.append(_double(h, upsample.weight[:, some], upsample.bias[some]))
    if last > C:
        parts.append(skip[:, max(first - C, 0) : last - C])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _conv(x: Tensor, conv: nn.Conv3d, some: slice = slice(None), total: Tensor | None = None) -> Tensor:
    """Convolve `some` of the input channels with stride 1, keeping the size; add to `total`, the sum over the others.

    Without gradients, it takes a few layers of x at a time. The bias is added only when `total` is None.
    """
    weight, bias, margin = conv.weight[:, some], conv.bias if total is None else None, conv.padding[0]
    if torch.is_grad_enabled():
        return F.conv3d(x, weight, bias, padding=margin)
    X, layer_bytes = x.shape[2], (x[:, :, 0].numel() // x.shape[1] * (x.shape[1] + len(weight))) * x.element_size()
    size = max(4, SLAB_BYTES // layer_bytes)
    if size >= X and total is None:
        return F.conv3d(x, weight, bias, padding=margin)
    out = x.new_zeros(len(x), len(weight), *x.shape[2:]) if total is None else total
    for first in range(0, X, size):
        last = min(first + size, X)
        low, high = max(first - margin, 0), min(last + margin, X)
        slab = F.pad(x[:, :, low:high], (0, 0, 0, 0, low - first + margin, last + margin - high))
        out[:, :, first:last] += F.conv3d(slab, weight, bias, padding=(0, margin, margin))
    return out


def _double(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv_transpose3d` of stride 2, weights (in, out, 2, 2, 2), as a 1³ convolution: a child has a single parent."""
    x = F.conv3d(h, weight.flatten(1).t()[:, :, None, None, None], bias.repeat_interleave(8))  # (B, 8 out, X, Y, Z)
    x = x.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
