"""Spatial sparse attention (Direct3D-S2, section 4.1, eq. 6-8): the gated sum of compression, selection and windows.

Sizes named in this file:
    N   tokens (voxels), all samples packed      H   query heads              C   channels of the tokens
    Nc  compressed tokens                        Hk  key/value heads          D   channels per head
    c   edge of a compression block, in voxels   K   blocks selected per query and key/value head
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.attention_plan import attention_plan, cells_of, places_of
from ..geometry.token_runs import sliding_plan, token_runs
from ..geometry.voxels import BLOCK, Voxels
from ..kernels.compression import compresses_together, pooled_conv_compression, pooled_silu
from ..kernels.devices import autocast_dtype
from ..kernels.kept import Kept
from ..kernels.segment_sum import take_segments
from ..kernels.spatial_sparse_attention import spatial_sparse_attention
from .linear import Linear, project
from .sparse_conv import PackedGroupNorm, SubmanifoldConv3d, mean_pool

MAX_NORM_GROUPS = 32
Branch = Literal["compression", "selection", "window"]
BRANCHES: tuple[Branch, ...] = ("compression", "selection", "window")


def check_branches(
    branches: tuple[Branch, ...], in_sequence: bool = False, compression_block: int = BLOCK, pooled_conv: bool = False
) -> None:
    """Raise ValueError unless some branches, and blocks of consecutive tokens if so wanted, fit together."""
    if not branches or branches != tuple(branch for branch in BRANCHES if branch in branches):
        raise ValueError(f"expected branches among {', '.join(BRANCHES)}, in this order, got {', '.join(branches)}")
    if "selection" in branches and "compression" not in branches:
        raise ValueError(f"expected compression beside selection, which it scores, got {', '.join(branches)}")
    if in_sequence and (pooled_conv or compression_block not in (BLOCK // 2, BLOCK)):
        raise ValueError(
            f"expected blocks of consecutive tokens with a compression_block of {BLOCK // 2} or {BLOCK} and without "
            f"pooled_conv, got {compression_block} and pooled_conv {pooled_conv}"
        )


class PooledConvCompression(nn.Module):
    """δ of the paper and of v1.0: norm, pool, two 3³ convolutions on the pooled grid, plus the pooled input."""

    def __init__(self, channels: int):
        super().__init__()
        groups = math.gcd(MAX_NORM_GROUPS, channels)
        self.norm_in = PackedGroupNorm(groups, channels)
        self.conv_in = SubmanifoldConv3d(channels, channels)
        self.norm_out = PackedGroupNorm(groups, channels)
        self.conv_out = SubmanifoldConv3d(channels, channels)

    def forward(self, x: Tensor, voxels: Voxels, c: int) -> Tensor:
        """x (N, channels) -> (Nc, channels), a row for each voxel of `voxels.coarsen(c)`."""
        activated, coarse = mean_pool(self.norm_in(x, voxels, silu=True), voxels, c)
        hidden = self.conv_in(activated, coarse)
        hidden = self.conv_out(self.norm_out(hidden, coarse, silu=True), coarse)
        return hidden + mean_pool(x, voxels, c)[0]

    def parts(self) -> list[Tensor]:
        """The parameters, in the order of `pooled_conv_compression`."""
        norms, convolutions = (self.norm_in, self.norm_out), (self.conv_in, self.conv_out)
        vectors = [vector for norm in norms for vector in (norm.weight, norm.bias)]
        return vectors + [conv.bias for conv in convolutions] + [conv.weight for conv in convolutions]


class PointwiseCompression(nn.Module):
    """δ of v1.1: a 1³ convolution, SiLU, pool."""

    def __init__(self, channels: int):
        super().__init__()
        self.pointwise = nn.Linear(channels, channels)

    def forward(self, x: Tensor, voxels: Voxels, c: int) -> Tensor:
        """x (N, channels) -> (Nc, channels), a row for each voxel of `voxels.coarsen(c)`."""
        return mean_pool(F.silu(self.pointwise(x)), voxels, c)[0]

    def parts(self) -> list[Tensor]:
        """The parameters: weight and bias."""
        return [self.pointwise.weight, self.pointwise.bias]


class SpatialSparseAttention(nn.Module):
    """Self attention of each sample over three views of it: compressed, selected blocks, and windows.

    Args:
        hidden_size: C.
        num_heads, num_kv_heads: H and Hk; Hk divides H.
        compression_block: c; it must divide the edge of a selection block, 8 voxels.
        pooled_conv: whether compression is `PooledConvCompression`; otherwise it is `PointwiseCompression`.
        top_k: K, the number of blocks selected for each query and key/value head.
        window: edge of the attention windows, in voxels.
        shift: displacement of the windows, in voxels.
        head_dim: D. Default: C / H.
        branches: those in use, in the order of `BRANCHES`; others have no parameters. Selection needs compression.
        in_sequence: take blocks of 64 consecutive tokens instead of 8³ voxels, and a window that slides over the
            tokens, as NSA does. Compression takes a block (c = 8) or a quarter of it (c = 4). The window reaches
            `window`² / 2 tokens to both sides, so that it holds about as many tokens as a window of voxels.

    Raises:
        ValueError: for sizes that do not divide each other, or branches that do not go together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        compression_block: int,
        pooled_conv: bool,
        top_k: int,
        window: int = 8,
        shift: int = 0,
        head_dim: int | None = None,
        branches: tuple[Branch, ...] = BRANCHES,
        in_sequence: bool = False,
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"expected num_kv_heads that divides num_heads {num_heads}, got {num_kv_heads}")
        if BLOCK % compression_block:
            raise ValueError(f"expected a compression_block that divides {BLOCK}, got {compression_block}")
        check_branches(branches, in_sequence, compression_block, pooled_conv)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.compression_block, self.top_k = compression_block, top_k if "selection" in branches else 0
        self.window, self.shift = window if "window" in branches else 0, shift
        self.has_compression, self.in_sequence = "compression" in branches, in_sequence

        query_size, kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.to_q = Linear(hidden_size, query_size, bias=False)
        self.to_k = Linear(hidden_size, kv_size, bias=False)
        self.to_v = Linear(hidden_size, kv_size, bias=False)
        self.to_out = Linear(query_size, hidden_size, bias=False)
        self.gate = Linear(hidden_size, len(branches), bias=False)
        if self.has_compression:
            self.block_position = nn.Parameter(torch.zeros(compression_block**3, kv_size))  # PE of eq. 7
            compression = PooledConvCompression if pooled_conv else PointwiseCompression
            self.compress_k = compression(kv_size)
            self.compress_v = compression(kv_size)

    def forward(self, x: Tensor, voxels: Voxels, kept: Kept | None = None) -> Tensor:
        """x (N, C) -> (N, C); `kept` keeps the results of attention, if it is computed twice."""
        heads, kv_heads = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        q, k, v, gates = project(x, [self.to_q, self.to_k, self.to_v, self.gate])  # k and v (N, Hk D)
        q, gates = q.unflatten(-1, heads), gates.sigmoid()  # (N, H, D), and (N, 3) or a column for each branch
        if self.in_sequence:
            voxels = token_runs(voxels)
        compressed_k = compressed_v = None
        if self.has_compression:
            compressed_k, compressed_v = self.compress(k, v, voxels)  # (Nc, Hk, D)
        k, v = k.unflatten(-1, kv_heads), v.unflatten(-1, kv_heads)  # (N, Hk, D)

        if self.in_sequence:
            plan = sliding_plan(voxels, self.compression_block, self.window**2 // 2)
        else:
            plan = attention_plan(voxels, self.compression_block, self.window, self.shift)
        out = spatial_sparse_attention(q, k, v, compressed_k, compressed_v, gates, plan, self.top_k, kept)
        return self.to_out(out.flatten(1))

    def compress(self, k: Tensor, v: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """k, v (N, Hk D) -> compressed keys and values (Nc, Hk, D), eq. 7."""
        c, kv_heads = self.compression_block, (self.num_kv_heads, self.head_dim)
        if compresses_together(k):
            compressed_k, compressed_v = self.compress_together(k, v, voxels)
        else:
            position = take_segments(self.block_position, *places_of(voxels, c))
            compressed_k = self.compress_k(k + position, voxels, c)
            compressed_v = self.compress_v(v, voxels, c)
        return compressed_k.to(k.dtype).unflatten(-1, kv_heads), compressed_v.to(v.dtype).unflatten(-1, kv_heads)

    def compress_together(self, k: Tensor, v: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """Compress keys and values together, in few launches: k, v (N, Hk D) -> (Nc, Hk D) each."""
        cells = cells_of(voxels, self.compression_block)
        parts = list(zip(self.compress_k.parts(), self.compress_v.parts(), strict=True))
        if isinstance(self.compress_k, PointwiseCompression):
            weight, bias = (torch.stack(pair) for pair in parts)  # (2, Hk D, Hk D), (2, Hk D)
            x = torch.stack((k + take_segments(self.block_position, cells.places, cells.place), v))  # (2, N, Hk D)
            return pooled_silu(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)), cells).unbind()
        parameters = [parameter for pair in parts for parameter in pair]
        dtype, norm = autocast_dtype(k.device) or parameters[-1].dtype, self.compress_k.norm_in
        return pooled_conv_compression(k, v, self.block_position, parameters, cells, norm.num_groups, norm.eps, dtype)
