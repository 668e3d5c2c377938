"""Layers on packed voxels: submanifold convolution, mean pooling, group norm.

Features are (N, C), their rows follow `Voxels.coords`. A submanifold convolution has its outputs where its inputs are,
and a neighbour which is not occupied counts as zero. Gathering the 27 neighbours makes it one matrix product, done in
chunks of rows, so that the gathered copy stays small whatever N is.

Sizes named in this file:
    N  voxels, all samples packed      C          channels
    B  samples                         Cin, Cout  input and output channels of a convolution
    J  taps: an offset's weight for one child, 27 in a plain convolution
"""

import math
from itertools import product

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..geometry.voxels import BLOCK, Voxels, per_token, sample_means
from ..kernels.device_constant import device_constant
from ..kernels.devices import HAS_TRITON
from ..kernels.ragged import Ragged
from ..kernels.segment_sum import segment_sum

CPU_CHUNK_BYTES = 4 << 20  # neighbours gathered at a time: what stays in a core's cache
DEVICE_CHUNK_BYTES = 512 << 20
MIN_CHUNK_ROWS = 1024


class SubmanifoldConv3d(nn.Module):
    """3³ convolution on occupied voxels: `out[n] = bias + Σ_k x[neighbors[k, n]] @ weight[k]`.

    `weight` is (27, Cin, Cout) in the offset order of `Voxels.neighbors` (x slowest), `bias` (Cout,).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(27, in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (27 * in_channels)))  # keeps the variance before a SiLU

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, Cin) -> (N, Cout), in the autocast dtype under autocast; ValueError if x does not fit the voxels."""
        return _convolve(x, voxels, self.weight, self.bias, children=1)

    def dense_weights(self) -> Tensor:
        """What `gather_conv` takes, (27, Cin, Cout)."""
        return self.weight


class SubdivideConv3d(SubmanifoldConv3d):
    """Subdivide every voxel into its 8 children, which copy its features, then `SubmanifoldConv3d` on the children.

    The 27 neighbours of a child lie in 2³ of its parent's 27 neighbours, and those with one parent share features. So
    the same sum is a convolution of the coarse voxels with 8 Cout output channels, whose weights are sums of `weight`:
    an eighth of the gathered rows, and neither features nor neighbours of the fine grid are needed.

    With `place` every child also has a weight of its own for its parent, `place` (8, Cin, Cout), zeros at first: so it
    costs nothing more.
    """

    def __init__(self, in_channels: int, out_channels: int, place: bool = False):
        super().__init__(in_channels, out_channels)
        self.place = nn.Parameter(torch.zeros(8, in_channels, out_channels)) if place else None

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, Cin) -> (8 N, Cout), child i, j, k of voxel n in row 8 n + 4 i + 2 j + k: `Voxels.child_order` sorts."""
        return _convolve(x, voxels, self._tap_weights(), self.bias, children=8)

    def dense_weights(self) -> Tensor:
        """What `gather_conv` takes, (27, Cin, 8 Cout)."""
        return _dense_weight(self._tap_weights(), 8)

    def _tap_weights(self) -> Tensor:
        """Weights of the 8 taps of each child, (64, Cin, Cout)."""
        weight = _children_weight(self.weight)
        if self.place is None:
            return weight
        at_parent = device_constant(tuple(8 * c + 7 - c for c in range(8)), weight.device)  # tap 7 - c of child c
        return weight.index_add(0, at_parent, self.place)


def _children_weight(weight: Tensor) -> Tensor:
    """Weights (27, Cin, Cout) on the subdivided grid -> those of the taps on the coarse one, (64, Cin, Cout).

    Per axis, child 0 finds its fine offsets (-1, 0, 1) at the coarse offsets (-1, 0, 0), child 1 at (0, 0, 1).
    """
    return _ChildrenWeight.apply(weight)


class _ChildrenWeight(torch.autograd.Function):
    """Along an axis, the taps are before and centre + after (of child 0), before + centre and after (of child 1)."""

    @staticmethod
    def forward(ctx, weight):
        first, second = (device_constant(rows, weight.device) for rows in ((0, 1, 0, 2), (2, 1)))
        ctx.shape = weight.shape
        weight = weight.unflatten(0, (3, 3, 3))  # (x, y, z, Cin, Cout)
        for axis in (2, 1, 0):
            taps = weight.index_select(axis, first)
            taps.narrow(axis, 1, 2).add_(weight.index_select(axis, second))
            weight = taps
        channels = weight.shape[3:]
        return weight.view(2, 2, 2, 2, 2, 2, *channels).permute(0, 2, 4, 1, 3, 5, 6, 7).reshape(64, *channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtaps):
        first, second = (device_constant(rows, dtaps.device) for rows in ((0, 1, 1), (2, 2, 3)))
        dtaps = dtaps.unflatten(0, (2, 2, 2, 2, 2, 2)).permute(0, 3, 1, 4, 2, 5, 6, 7)
        dtaps = dtaps.reshape(4, 4, 4, *ctx.shape[1:])
        for axis in (0, 1, 2):
            dtaps = dtaps.index_select(axis, first).add_(dtaps.index_select(axis, second))
        return dtaps.flatten(0, 2)


def _taps(children: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coarse offset (J,) and child (J,) which each weight joins: 27 of a single child, or 8 for each of 8 children."""
    offset, child = CHILDREN_TAPS if children == 8 else (tuple(range(27)), (0,) * 27)
    return device_constant(offset, device, torch.long), device_constant(child, device, torch.long)


def _children_taps() -> tuple[tuple, tuple]:
    pairs = list(product(product((0, 1), repeat=3), repeat=2))  # child and tap, per axis: together 0, 1, 2 are -1, 0, 1
    offset = tuple(sum(9 // 3**i * (c + t) for i, (c, t) in enumerate(zip(*pair, strict=True))) for pair in pairs)
    return offset, tuple(4 * i + 2 * j + k for (i, j, k), _ in pairs)


CHILDREN_TAPS = _children_taps()  # (64,) each


def _convolve(x: Tensor, voxels: Voxels, weight: Tensor, bias: Tensor, children: int) -> Tensor:
    if x.shape != (len(voxels), weight.shape[1]):
        raise ValueError(f"expected features ({len(voxels)}, {weight.shape[1]}), got {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _GatherConv.apply(x, voxels.neighbors, weight, bias, children)


class _GatherConv(torch.autograd.Function):
    """`out[children n + c] = bias + Σ_j x[neighbors[offset_j, n]] @ weight[j]` over the taps j of child c."""

    @staticmethod
    def forward(ctx, x, neighbors, weight, bias, children):
        ctx.save_for_backward(x, neighbors, weight)
        ctx.children = children
        return gather_conv(x, neighbors, _dense_weight(weight, children), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        """One gathering serves both gradients: voxel m is read at offset k by its neighbour at the opposite offset."""
        x, neighbors, weight = ctx.saved_tensors
        if x.is_cuda and HAS_TRITON:
            return _triton_backward(x, neighbors, weight, dout, ctx.children)
        J, Cin, Cout = weight.shape
        matrix = weight.transpose(1, 2).reshape(J * Cout, Cin)
        dx = torch.empty_like(x)
        dmatrix = matrix.new_zeros(matrix.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        offset, child = _taps(ctx.children, x.device)
        for rows, columns in _gathered(dout, neighbors, 26 - offset, child, ctx.children):
            torch.mm(columns, matrix, out=dx[rows])
            dmatrix += columns.t() @ x[rows]
        dweight = dmatrix.view(J, Cout, Cin).transpose(1, 2).to(weight.dtype)
        return dx, None, dweight, dout.sum(0), None


def gather_conv(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution itself, for some rows of the result and without a gradient.

    Args:
        x: (N, Cin).
        neighbors: (27, M) rows of x around each of M voxels, N where there is none.
        weight: (27, Cin, children · Cout), as `dense_weights` of a layer gives it.
        bias: (Cout,).

    Returns:
        (M · children, Cout), child c of voxel m in row children · m + c.
    """
    M, (_, _, channels), Cout = neighbors.shape[1], weight.shape, len(bias)
    if x.is_cuda and HAS_TRITON:
        from ..kernels.gather_conv_triton import gather_conv_triton

        return gather_conv_triton(x, neighbors, weight, bias).view(-1, Cout)
    out = x.new_empty(M, channels)
    for rows, columns in _gathered(x, neighbors):
        torch.addmm(bias.repeat(channels // Cout), columns, weight.flatten(0, 1), out=out[rows])
    return out.view(-1, Cout)


def _dense_weight(weight: Tensor, children: int) -> Tensor:
    """Weights of the taps (J, Cin, Cout) -> (27, Cin, children · Cout): a child has none at what are not its taps."""
    if children == 1:
        return weight
    offset, child = _taps(children, weight.device)
    dense = weight.new_zeros(27, children, *weight.shape[1:])
    dense[offset, child] = weight
    return dense.transpose(1, 2).flatten(2)


def _triton_backward(x: Tensor, neighbors: Tensor, weight: Tensor, dout: Tensor, children: int) -> tuple:
    """Gradients of `_GatherConv.forward`, in its order."""
    from ..kernels.gather_conv_triton import gather_convs, gather_convs_gradients

    rows = dout.reshape(1, len(x), -1)  # (1, N, children Cout)
    dx = gather_convs(rows, neighbors, _dense_weight(weight, children)[None], transposed=True)[0]
    dtype = weight.dtype if children == 1 else torch.float32
    (dweight,), (dbias,) = gather_convs_gradients(x[None], neighbors, rows, dtype)  # (27, Cin, children Cout)
    if children > 1:
        dweight = dweight.unflatten(2, (children, -1)).transpose(1, 2)[_taps(children, x.device)]
        dbias = dbias.unflatten(0, (children, -1)).sum(0)
    return dx, None, dweight.to(weight.dtype), dbias.to(weight.dtype), None


def permute_rows(x: Tensor, order: Tensor) -> Tensor:
    """x[order] for a permutation: x (N, C), order (N,) long. Its gradient is the inverse permutation, no sum."""
    return _PermuteRows.apply(x, order)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return _take_rows(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (order,) = ctx.saved_tensors
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return _take_rows(dout, inverse), None


def _take_rows(x: Tensor, order: Tensor) -> Tensor:
    if x.is_cuda and HAS_TRITON:
        from ..kernels.gather_conv_triton import take_rows_triton

        return take_rows_triton(x, order)
    return x.index_select(0, order)


def _gathered(x: Tensor, neighbors: Tensor, offset: Tensor | None = None, child: Tensor | int = 0, children: int = 1):
    """Chunks of voxels n as (slice, x[children · neighbors[offset, n] + child] (rows, J C), zero where none is)."""
    J, C = 27 if offset is None else len(offset), x.shape[1]
    padded = nn.functional.pad(x, (0, 0, 0, children))
    chunk_bytes = CPU_CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES
    num_rows = max(MIN_CHUNK_ROWS, chunk_bytes // (J * C * x.element_size()))
    for first in range(0, neighbors.shape[1], num_rows):
        rows = slice(first, first + num_rows)
        index = neighbors[:, rows].t()  # (rows, 27)
        if offset is not None:
            index = index[:, offset] * children + child
        yield rows, padded.index_select(0, index.reshape(-1)).view(-1, J * C)


def mean_pool(x: Tensor, voxels: Voxels, factor: int) -> tuple[Tensor, Voxels]:
    """Pool the voxels of each factor³ cell: `sum / (count + 1)`.

    The divisor is that of the released models, which average into a zero that is counted; it is kept everywhere.

    Args:
        x: features (N, C).
        voxels: their voxels; factor must divide the resolution.

    Returns:
        Pooled features, dtype of x, summed in at least float32; and their voxels, `voxels.coarsen(factor)[0]`.
    """
    coarse, parent = voxels.coarsen(factor)
    total = segment_sum(x, tokens_of_cells(voxels, factor), parent)
    return (total / (voxels.coarse_counts(factor) + 1)[:, None]).to(x.dtype), coarse


def tokens_of_cells(voxels: Voxels, factor: int) -> Ragged:
    """The voxels of each voxel of `coarsen(factor)`."""
    return voxels.cached(("cells", factor), lambda: _cells(voxels, factor))


def _cells(voxels: Voxels, factor: int) -> Ragged:
    in_order = factor == BLOCK and voxels.resolution <= BLOCK**2  # one block of coarse voxels: lexicographic as blocks
    order = None if in_order else voxels.coarsen(factor)[1].argsort(stable=True).int()
    offsets = nn.functional.pad(voxels.coarse_counts(factor).cumsum(0), (1, 0)).int()
    return Ragged(offsets, len(voxels), order, longest=factor**3)


def side_by_side(x: Tensor, voxels: Voxels) -> Tensor:
    """Features (N, C) of the 2³ children of every coarse voxel in one row, zero where there is no child.

    Returns (coarse N, 8 C) in the order of `voxels.coarsen(2)[0]`, child i, j, k in columns from (4 i + 2 j + k) C.
    """
    coarse = voxels.coarsen(2)[0]
    return x.new_zeros(8 * len(coarse), x.shape[1]).index_copy(0, voxels.slots, x).view(len(coarse), -1)


def samples_of(voxels: Voxels) -> Ragged:
    """The voxels of each sample."""
    return voxels.cached(("samples",), lambda: Ragged(voxels.cu_seqlens, len(voxels)))


class PackedGroupNorm(nn.Module):
    """Group norm of each sample over its tokens and the channels of a group; statistics in at least float32.

    Raises ValueError if `num_groups` does not divide `channels`.
    """

    def __init__(self, num_groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"expected num_groups that divides {channels} channels, got {num_groups}")
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, voxels: Voxels, silu: bool = False) -> Tensor:
        """(N, C) -> (N, C), dtype of x; with `silu` the SiLU of the norm."""
        if x.is_cuda and HAS_TRITON and x.dtype != torch.float64:
            from ..kernels.group_norm_triton import group_norm_triton

            return group_norm_triton(x, self.weight, self.bias, samples_of(voxels), self.num_groups, self.eps, silu)
        normed = _PackedGroupNorm.apply(x, self.weight, self.bias, voxels, self.num_groups, self.eps)
        return nn.functional.silu(normed) if silu else normed


class _PackedGroupNorm(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias. Keeps only x and (B, C) statistics for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, voxels, num_groups, eps):
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _group_mean(sample_means(rows, voxels), num_groups)  # (B, C)
        centred = rows - per_token(mean, voxels)
        variance = _group_mean(sample_means(centred.square(), voxels), num_groups)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.voxels, ctx.num_groups = voxels, num_groups
        return torch.addcmul(bias, centred, per_token(rstd * weight, voxels)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        voxels, drows = ctx.voxels, dy.to(mean.dtype)
        mean_of_token, rstd_of_token = per_token(torch.cat([mean, rstd], dim=1), voxels).chunk(2, dim=1)
        normed = (x.to(mean.dtype) - mean_of_token) * rstd_of_token
        means = sample_means(drows, voxels), sample_means(drows * normed, voxels)  # (B, C) of dy and of dy · normed
        counts = voxels.cu_seqlens.diff()[:, None]
        dbias, dweight = ((m * counts).sum(0) for m in means)
        both = torch.cat([_group_mean(m * weight, ctx.num_groups) for m in means], dim=1)
        mean_dy, mean_dy_normed = per_token(both, voxels).chunk(2, dim=1)
        dx = ((drows * weight - mean_dy - normed * mean_dy_normed) * rstd_of_token).to(x.dtype)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _group_mean(per_channel: Tensor, num_groups: int) -> Tensor:
    """(B, C) -> (B, C): the mean of each channel's group."""
    group_size = per_channel.shape[1] // num_groups
    return per_channel.unflatten(1, (num_groups, group_size)).mean(2).repeat_interleave(group_size, dim=1)
