"""Packing of latents into fewer tokens, as TRELLIS does: 2³ voxels make a token, by convolutions.

Before the transformer, a residual block works on the voxels and a second one on the pooled voxels. After it, one works
on the voxels again, and a last one refines them; both see what their counterparts before the transformer made.

Sizes named in this file:
    N  voxels, all samples packed      P  channels of the voxels
    M  tokens, their coarse voxels     C  channels of the tokens, and of the time embedding
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.segments import samples_of, tokens_of_cells
from ..geometry.voxels import Voxels
from ..kernels.segment_sum import take_segments
from .sparse_conv import SubmanifoldConv3d, mean_pool
from .transformer import LayerNorm32, ModulatedNorm

EDGE = 2  # voxels along the edge of a token


class ModulatedResBlock(nn.Module):
    """Norm, SiLU, 3³ convolution, twice, plus the input; the time modulates the second norm."""

    def __init__(self, in_channels: int, embedding_size: int, out_channels: int):
        super().__init__()
        self.norm_in = LayerNorm32(in_channels, affine=True)
        self.conv_in = SubmanifoldConv3d(in_channels, out_channels)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(embedding_size, 2 * out_channels))
        self.norm_out = ModulatedNorm(out_channels)
        self.conv_out = SubmanifoldConv3d(out_channels, out_channels)
        self.skip = nn.Linear(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, voxels: Voxels, embedding: Tensor) -> Tensor:
        """x (N, in_channels), time embedding (B, C) -> (N, out_channels)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        h = self.conv_in(F.silu(self.norm_in(x)), voxels)
        h = self.conv_out(F.silu(self.norm_out(h, shift, scale, samples_of(voxels))), voxels)
        return h + self.skip(x)


class TokenPacking(nn.Module):
    """The residual blocks before and after the transformer."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        P, C = channels, hidden_size
        self.fine_in = ModulatedResBlock(P, C, P)
        self.coarse_in = ModulatedResBlock(P, C, C)
        self.fine_out = ModulatedResBlock(2 * C, C, P)
        self.last = ModulatedResBlock(2 * P, C, P)

    def initialize(self) -> None:
        """Start training from scratch, with every block the identity, or its linear skip."""
        for block in (self.fine_in, self.coarse_in, self.fine_out, self.last):
            nn.init.zeros_(block.conv_out.weight)
            nn.init.zeros_(block.conv_out.bias)

    def pack(self, x: Tensor, voxels: Voxels, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (N, P), time embedding (B, C) -> tokens (M, C), and what `unpack` needs: (N, P) and (M, C)."""
        fine = self.fine_in(x, voxels, embedding)
        pooled, coarse_voxels = mean_pool(fine, voxels, EDGE)
        coarse = self.coarse_in(pooled, coarse_voxels, embedding)
        return coarse, (fine, coarse)

    def unpack(self, h: Tensor, made: tuple[Tensor, Tensor], voxels: Voxels, embedding: Tensor) -> Tensor:
        """h (M, C), what `pack` made, time embedding (B, C) -> (N, P)."""
        fine, coarse = made
        parent = voxels.coarsen(EDGE)[1]
        spread = take_segments(torch.cat([h, coarse], dim=1), tokens_of_cells(voxels, EDGE), parent)  # (N, 2 C)
        x = self.fine_out(spread, voxels, embedding)
        return self.last(torch.cat([x, fine], dim=1), voxels, embedding)
