"""Layers on packed voxels: submanifold convolution, mean pooling, group norm.

Features are (N, C), their rows follow `Voxels.coords`. A submanifold convolution has its outputs where its inputs are,
and a neighbour which is not occupied counts as zero. Gathering the 27 neighbours makes it one matrix product, done in
chunks of rows, so that the gathered copy stays small whatever N is.

Sizes named in this file:
    N  voxels, all samples packed      K     offsets, 27
    B  samples                         I, O  input and output channels of a convolution
    G  channel groups                  C     channels
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .voxels import Voxels

CPU_CHUNK_BYTES = 4 << 20  # neighbours gathered at a time: what stays in a core's cache
DEVICE_CHUNK_BYTES = 512 << 20
MIN_CHUNK_ROWS = 1024


class SubmanifoldConv3d(nn.Module):
    """3³ convolution on occupied voxels: `out[n] = bias + Σ_k x[neighbors[k, n]] @ weight[k]`.

    `weight` is (27, I, O) in the offset order of `Voxels.neighbors` (x slowest), `bias` (O,).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(27, in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (27 * in_channels)))  # keeps the variance before a SiLU

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, I) -> (N, O), in the autocast dtype under autocast. Raises ValueError if x does not fit the voxels."""
        return _convolve(x, voxels, self.weight, self.bias)


class SubdivideConv3d(SubmanifoldConv3d):
    """Subdivide every voxel into its 8 children, which copy its features, then `SubmanifoldConv3d` on the children.

    The 27 neighbours of a child lie in 2³ of the parent's 27 neighbours, and those that share a parent share features.
    So the same sum is a convolution of the coarse voxels with 8 O output channels, its weights being sums of `weight`:
    an eighth of the gathered rows, and neither features nor neighbours of the fine grid are needed.
    """

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, I) -> (8 N, O), child i, j, k of voxel n in row 8 n + 4 i + 2 j + k; `Voxels.child_order` sorts these."""
        out = _convolve(x, voxels, children_weight(self.weight), self.bias.repeat(8))  # (N, 8 O)
        return out.view(-1, self.bias.numel())


def children_weight(weight: Tensor) -> Tensor:
    """Weights (27, I, O) on a subdivided grid -> weights (27, I, 8 O) on the coarse one, child i, j, k slower than O.

    Per axis, child 0 finds its offsets (-1, 0, 1) in the coarse neighbours (-1, 0, 0), child 1 in (0, 0, 1).
    """
    weight = weight.unflatten(0, (3, 3, 3))  # (3, 3, 3, I, O)
    for axis in range(3):
        before, centre, after = weight.unbind(axis)
        none = torch.zeros_like(centre)
        child_0 = torch.stack([before, centre + after, none], dim=axis)
        child_1 = torch.stack([none, before + centre, after], dim=axis)
        weight = torch.stack([child_0, child_1], dim=-2)  # (3, 3, 3, I, .., 2, O)
    return weight.flatten(0, 2).flatten(2)


def _convolve(x: Tensor, voxels: Voxels, weight: Tensor, bias: Tensor) -> Tensor:
    if x.shape != (len(voxels), weight.shape[1]):
        raise ValueError(f"expected features ({len(voxels)}, {weight.shape[1]}), got {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _GatherConv.apply(x, voxels.neighbors, weight, bias)


class _GatherConv(torch.autograd.Function):
    """x (N, I), neighbors (K, N) with neighbors[K-1-k] the inverse of neighbors[k], weight (K, I, O), bias (O,)."""

    @staticmethod
    def forward(ctx, x, neighbors, weight, bias):
        ctx.save_for_backward(x, neighbors, weight)
        return _gather_conv(x, neighbors, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, neighbors, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:  # the outputs that n is a neighbour of are the neighbours of n, mirrored
            dx = _gather_conv(dout, neighbors, weight.flip(0).transpose(1, 2), None)
        if ctx.needs_input_grad[2]:
            dweight = _gather_conv_dweight(x, neighbors, dout, weight)
        if ctx.needs_input_grad[3]:
            dbias = dout.sum(0)
        return dx, None, dweight, dbias


def _gather_conv(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.flatten(0, 1)  # (K I, O)
    out = x.new_empty(neighbors.shape[1], weight.shape[1])
    for rows, columns in _gathered(x, neighbors):
        if bias is None:
            torch.mm(columns, weight, out=out[rows])
        else:
            torch.addmm(bias, columns, weight, out=out[rows])
    return out


def _gather_conv_dweight(x: Tensor, neighbors: Tensor, dout: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dweight = torch.zeros(weight.flatten(0, 1).shape, dtype=dtype, device=x.device)  # (K I, O)
    for rows, columns in _gathered(x, neighbors):
        dweight += columns.t() @ dout[rows]
    return dweight.view_as(weight).to(weight.dtype)


def _gathered(x: Tensor, neighbors: Tensor):
    """Chunks of rows as (slice, features of the K neighbours (rows, K I), zero where there is none)."""
    K, N = neighbors.shape
    padded = nn.functional.pad(x, (0, 0, 0, 1))
    chunk_bytes = CPU_CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(MIN_CHUNK_ROWS, chunk_bytes // (K * x.shape[1] * x.element_size()))
    for first in range(0, N, rows):
        index = neighbors[:, first : first + rows].t().reshape(-1)
        yield slice(first, first + rows), padded.index_select(0, index).view(-1, K * x.shape[1])


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
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(coarse), x.shape[1], dtype=dtype, device=x.device).index_add(0, parent, x.to(dtype))
    count = torch.bincount(parent, minlength=len(coarse))
    return (total / (count + 1)[:, None]).to(x.dtype), coarse


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

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, C) -> (N, C), dtype of x."""
        return _PackedGroupNorm.apply(x, self.weight, self.bias, voxels.counts, self.num_groups, self.eps)


class _PackedGroupNorm(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias. Keeps only x and (B, C) statistics for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, counts, num_groups, eps):
        y, statistics = torch.empty_like(x), []
        for rows, out in zip(x.split(counts), y.split(counts), strict=True):
            rows = rows.to(torch.promote_types(x.dtype, torch.float32))
            mean = _group_mean(rows.sum(0) / max(len(rows), 1), num_groups)  # (C,)
            centred = rows - mean
            variance = _group_mean(centred.square().sum(0) / max(len(rows), 1), num_groups)
            rstd = (variance + eps).rsqrt()
            out.copy_(centred * (rstd * weight) + bias)
            statistics.append((mean, rstd))
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.counts, ctx.num_groups = statistics, counts, num_groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x)
        dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device)
        dbias = torch.zeros_like(dweight)
        samples = zip(x.split(ctx.counts), dy.split(ctx.counts), dx.split(ctx.counts), ctx.statistics, strict=True)
        for rows, drows, out, (mean, rstd) in samples:
            normed, drows = (rows.to(dtype) - mean) * rstd, drows.to(dtype)
            sum_dy, sum_dy_normed = drows.sum(0), (drows * normed).sum(0)  # (C,)
            dbias += sum_dy
            dweight += sum_dy_normed
            mean_dy = _group_mean(sum_dy * weight / max(len(rows), 1), ctx.num_groups)
            mean_dy_normed = _group_mean(sum_dy_normed * weight / max(len(rows), 1), ctx.num_groups)
            out.copy_(rstd * (drows * weight - mean_dy - normed * mean_dy_normed))
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _group_mean(per_channel: Tensor, num_groups: int) -> Tensor:
    """(C,) -> (C,): the mean of each channel's group."""
    return per_channel.view(num_groups, -1).mean(1, keepdim=True).expand(-1, len(per_channel) // num_groups).flatten()
