"""Spatial sparse attention (Direct3D-S2, section 4.1, eq. 6-8): compression + selection + window, gated.

Sizes named in this file:
    N   tokens (voxels), all samples packed      H   query heads              C   channels of the tokens
    Nc  compressed tokens                        Hk  key/value heads          D   channels per head
    c   edge of a compression block, in voxels   K   blocks selected per query and key/value head
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.segments import samples_of, tokens_of_cells
from ..geometry.voxels import BLOCK, Voxels, Windows
from ..kernels.block_scores import select_blocks
from ..kernels.devices import HAS_TRITON
from ..kernels.packed_attention import packed_attention, packed_attention_with_lse
from ..kernels.ragged import AttentionPlan, Ragged
from ..kernels.segment_sum import take_segments
from ..kernels.selection_attention import selection_attention
from .sparse_conv import PackedGroupNorm, SubmanifoldConv3d, mean_pool

MAX_NORM_GROUPS = 32


class PooledConvCompression(nn.Module):
    """δ of the paper and of v1.0: norm, pool, two 3³ convolutions on the pooled grid, around a pooled skip."""

    def __init__(self, channels: int):
        super().__init__()
        groups = math.gcd(MAX_NORM_GROUPS, channels)
        self.norm_in = PackedGroupNorm(groups, channels)
        self.conv_in = SubmanifoldConv3d(channels, channels)
        self.norm_out = PackedGroupNorm(groups, channels)
        self.conv_out = SubmanifoldConv3d(channels, channels)

    def forward(self, x: Tensor, voxels: Voxels, c: int) -> Tensor:
        """x (N, channels) -> (Nc, channels), rows of `voxels.coarsen(c)`."""
        activated, coarse = mean_pool(self.norm_in(x, voxels, silu=True), voxels, c)
        hidden = self.conv_in(activated, coarse)
        hidden = self.conv_out(self.norm_out(hidden, coarse, silu=True), coarse)
        return hidden + mean_pool(x, voxels, c)[0]

    def parts(self) -> list[Tensor]:
        """The parameters, in the order of the kernels."""
        norms, convolutions = (self.norm_in, self.norm_out), (self.conv_in, self.conv_out)
        vectors = [vector for norm in norms for vector in (norm.weight, norm.bias)]
        return vectors + [conv.bias for conv in convolutions] + [conv.weight for conv in convolutions]


class PointwiseCompression(nn.Module):
    """δ of v1.1: a 1³ convolution, SiLU, pool."""

    def __init__(self, channels: int):
        super().__init__()
        self.pointwise = nn.Linear(channels, channels)

    def forward(self, x: Tensor, voxels: Voxels, c: int) -> Tensor:
        """x (N, channels) -> (Nc, channels), rows of `voxels.coarsen(c)`."""
        return mean_pool(F.silu(self.pointwise(x)), voxels, c)[0]

    def parts(self) -> list[Tensor]:
        """The parameters, in the order of the kernels."""
        return [self.pointwise.weight, self.pointwise.bias]


class SpatialSparseAttention(nn.Module):
    """Self attention of the tokens of each sample over three views of it.

    Args:
        hidden_size: C.
        num_heads, num_kv_heads: H and Hk; Hk divides H.
        compression_block: c, must divide the selection block of 8 voxels.
        pooled_conv: `PooledConvCompression`; otherwise `PointwiseCompression`.
        top_k: blocks selected for each query and key/value head.
        window: edge of the attention windows, in voxels.
        shift: displacement of the windows.
        head_dim: D. Default: C / H.

    Raises:
        ValueError: for sizes that do not divide each other.
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
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"expected num_kv_heads that divides num_heads {num_heads}, got {num_kv_heads}")
        if BLOCK % compression_block:
            raise ValueError(f"expected a compression_block that divides {BLOCK}, got {compression_block}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.compression_block, self.top_k = compression_block, top_k
        self.window, self.shift = window, shift

        query_size, kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.to_q = nn.Linear(hidden_size, query_size, bias=False)
        self.to_k = nn.Linear(hidden_size, kv_size, bias=False)
        self.to_v = nn.Linear(hidden_size, kv_size, bias=False)
        self.to_out = nn.Linear(query_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, 3, bias=False)
        self.block_position = nn.Parameter(torch.zeros(compression_block**3, kv_size))  # PE of eq. 7
        compression = PooledConvCompression if pooled_conv else PointwiseCompression
        self.compress_k = compression(kv_size)
        self.compress_v = compression(kv_size)

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """x (N, C) -> (N, C)."""
        heads, kv_heads = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        q = self.to_q(x).unflatten(-1, heads)  # (N, H, D)
        k, v = self.to_k(x), self.to_v(x)  # (N, Hk D)
        compressed_k, compressed_v = self.compress(k, v, voxels)  # (Nc, Hk, D)
        k, v = k.unflatten(-1, kv_heads), v.unflatten(-1, kv_heads)  # (N, Hk, D)

        gates = self.gate(x).sigmoid()  # (N, 3)
        geometry = voxels, self.compression_block, self.window, self.shift
        if x.is_cuda and HAS_TRITON:
            if torch.compiler.is_compiling():
                from ..kernels.uncompiled import spatial_attention_triton
            else:
                from ..kernels.spatial_sparse_attention_triton import spatial_attention_triton

            inputs = q, k, v, compressed_k, compressed_v, gates
            out = spatial_attention_triton(*inputs, attention_plan(*geometry), self.top_k, self.head_dim**-0.5)
        else:
            out = attend(q, k, v, compressed_k, compressed_v, gates, self.top_k, *geometry)
        return self.to_out(out.flatten(1))

    def compress(self, k: Tensor, v: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """k, v (N, Hk D) -> compressed keys and values (Nc, Hk, D), eq. 7."""
        c, kv_heads = self.compression_block, (self.num_kv_heads, self.head_dim)
        if k.is_cuda and HAS_TRITON and k.dtype != torch.float64 and len(k):
            compressed_k, compressed_v = self.compress_in_triton(k, v, voxels)
        else:
            position = take_segments(self.block_position, *_places_of(voxels, c))
            compressed_k = self.compress_k(k + position, voxels, c)
            compressed_v = self.compress_v(v, voxels, c)
        return compressed_k.to(k.dtype).unflatten(-1, kv_heads), compressed_v.to(v.dtype).unflatten(-1, kv_heads)

    def compress_in_triton(self, k: Tensor, v: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """What `compress` makes of some tokens, (Nc, Hk D) both, keys and values together in few launches."""
        if torch.compiler.is_compiling():
            from ..kernels import uncompiled as kernels
        else:
            from ..kernels import compression_triton as kernels

        cells = cells_of(voxels, self.compression_block)
        parts = list(zip(self.compress_k.parts(), self.compress_v.parts(), strict=True))
        if isinstance(self.compress_k, PointwiseCompression):
            weight, bias = (torch.stack(pair) for pair in parts)  # (2, Hk D, Hk D), (2, Hk D)
            x = torch.stack((k + take_segments(self.block_position, cells.places, cells.place), v))  # (2, N, Hk D)
            return kernels.pooled_silu_triton(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)), cells).unbind()
        parameters = [parameter for pair in parts for parameter in pair]
        device, norm = k.device.type, self.compress_k.norm_in
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters[-1].dtype
        return kernels.pooled_conv_compression_triton(
            k, v, self.block_position, parameters, cells, norm.num_groups, norm.eps, dtype
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    gates: Tensor,
    top_k: int,
    voxels: Voxels,
    c: int,
    window: int,
    shift: int,
) -> Tensor:
    """The gated sum of the three branches (eq. 6).

    Args:
        q: queries (N, H, D), rows of `voxels`.
        k, v: keys and values (N, Hk, D).
        compressed_k, compressed_v: of the compression branch (Nc, Hk, D), rows of `voxels.coarsen(c)`.
        gates: in [0, 1], (N, 3): compression, selection, window.
        top_k: blocks selected for each query and key/value head.
        c, window, shift: edges of the compression blocks and of the windows, displacement of the windows, in voxels.

    Returns:
        (N, H, D). Differentiable in the first six.
    """
    coarse = voxels.coarsen(c)[0]
    compression, lse = packed_attention_with_lse(
        q, compressed_k, compressed_v, voxels.cu_seqlens, coarse.cu_seqlens, voxels.counts, coarse.counts
    )
    counts = voxels.counts, coarse.counts, voxels.block_counts
    block_indices = select_blocks(q, compressed_k, lse, block_of_compressed(voxels, c), *counts, top_k)  # eq. 8
    selection = selection_attention(q, k, v, voxels.block_offsets, block_indices)
    windows = attend_windows(q, k, v, voxels.windows(shift, window))
    branches = zip(gates[:, :, None, None].unbind(1), (compression, selection, windows), strict=True)
    return sum(gate * out for gate, out in branches)


def attend_windows(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    """q (N, H, D), k and v (N, Hk, D) -> (N, H, D): attention within the windows."""
    cu_seqlens, lengths = windows.cu_seqlens, windows.lengths
    if windows.order is None:
        return packed_attention(q, k, v, cu_seqlens, cu_seqlens, lengths, lengths)
    q, k, v = q[windows.order], k[windows.order], v[windows.order]
    return packed_attention(q, k, v, cu_seqlens, cu_seqlens, lengths, lengths)[windows.inverse]


def block_of_compressed(voxels: Voxels, c: int) -> Tensor:
    """The selection block of each row of `voxels.coarsen(c)`, (Nc,) long."""
    coarse, parent = voxels.coarsen(c)
    blocks = torch.empty(len(coarse), dtype=torch.long, device=voxels.device)
    return blocks.scatter_(0, parent, voxels.block_of_token)  # all children lie in one selection block


def cells_of(voxels: Voxels, c: int):
    """What the kernels of compression must know of the voxels: `Cells`; kept, and shared by all layers and steps."""
    return voxels.cached(("compression", c), lambda: _cells_of(voxels, c))


def _cells_of(voxels: Voxels, c: int):
    from ..kernels.compression_triton import Cells

    coarse, parent = voxels.coarsen(c)
    return Cells(
        samples_of(voxels),
        samples_of(coarse),
        tokens_of_cells(voxels, c),
        parent,
        coarse.coords,
        coarse.neighbors,
        *_places_of(voxels, c),
    )


def _places_of(voxels: Voxels, c: int) -> tuple[Ragged, Tensor]:
    return voxels.cached(("places", c), lambda: _places(voxels, c))


def _places(voxels: Voxels, c: int) -> tuple[Ragged, Tensor]:
    """The voxels at each place in their cell of c³, and the place of each voxel, (N,) long."""
    x, y, z = (voxels.coords[:, 1:].long() % c).unbind(1)
    place = (x * c + y) * c + z
    ordered, order = place.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(c**3 + 1, device=place.device), out_int32=True)
    return Ragged(offsets, len(place), order.int()), place


def attention_plan(voxels: Voxels, c: int, window: int, shift: int) -> AttentionPlan:
    """What the kernels must know of the voxels; kept, and shared by all layers and steps."""
    return voxels.cached(("branches", c, window, shift), lambda: _attention_plan(voxels, c, window, shift))


def _attention_plan(voxels: Voxels, c: int, window: int, shift: int) -> AttentionPlan:
    N, coarse, windows = len(voxels), voxels.coarsen(c)[0], voxels.windows(shift, window)
    blocks, order = block_of_compressed(voxels, c).sort(stable=True)
    edges = torch.arange(voxels.block_offsets.numel(), device=voxels.device)
    in_order = c == BLOCK and voxels.resolution <= BLOCK**2  # one block of coarse voxels: lexicographic as blocks are
    return AttentionPlan(
        samples=samples_of(voxels),
        compressed=samples_of(coarse),
        blocks=Ragged(voxels.block_offsets, N, longest=max(voxels.windows(0).lengths, default=0)),
        windows=Ragged(windows.cu_seqlens, N, None if windows.order is None else windows.order.int()),
        children=Ragged(
            torch.searchsorted(blocks, edges, out_int32=True), len(coarse), None if in_order else order.int()
        ),
        sample_blocks=voxels.block_cu_seqlens,
        max_blocks=max(voxels.block_counts, default=0),
        block_order=None if c == BLOCK else _most_children_first(voxels, blocks),
    )


def _most_children_first(voxels: Voxels, block_of_child: Tensor) -> Tensor:
    """Blocks by sample and then by how many of `block_of_child` they hold, (M,) int32."""
    M = voxels.block_offsets.numel() - 1
    children = torch.zeros(M, dtype=torch.long, device=voxels.device)
    children.scatter_add_(0, block_of_child, torch.ones_like(block_of_child))
    blocks = torch.arange(M, device=voxels.device)
    sample = torch.searchsorted(voxels.block_cu_seqlens[1:], blocks, right=True)
    return (sample * (BLOCK**3 + 1) - children).sort(stable=True).indices.int()
