"""Layers on packed voxels: submanifold convolution, mean pooling, group norm.

Features are (N, C); their rows follow `Voxels.coords`. A submanifold convolution has outputs only where it has inputs,
and a neighbour that is not occupied counts as zero.

Sizes named in this file:
    N  voxels, all samples packed      C  channels      Cin, Cout  input and output channels of a convolution
"""

import math

import torch
from torch import Tensor, nn

from ..geometry.segments import samples_of, tokens_of_cells
from ..geometry.voxels import Voxels
from ..kernels.device_constant import device_constant
from ..kernels.devices import autocast_dtype
from ..kernels.gather_conv import children_weight, dense_weight, submanifold_conv
from ..kernels.group_norm import packed_group_norm
from ..kernels.segment_sum import segment_sum


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
        """(N, Cin) -> (N, Cout), in the autocast dtype under autocast.

        Raises:
            ValueError: if x does not fit the voxels.
        """
        return _convolve(x, voxels, self.weight, self.bias, children=1)

    def dense_weights(self) -> Tensor:
        """The weights as `gather_conv` takes them, (27, Cin, Cout)."""
        return self.weight


class SubdivideConv3d(SubmanifoldConv3d):
    """Subdivide every voxel into 8 children, which copy its features, and apply `SubmanifoldConv3d` to the children.

    The 27 neighbours of a child lie in only 2³ coarse voxels, its parent among them, and children of the same parent
    share features. So the result is a convolution of the coarse voxels with 8 Cout output channels, whose weights are
    sums of `weight`. It gathers an eighth of the rows, and needs no features or neighbours of the fine grid.

    With `place`, every child also has its own weight for its parent, `place` (8, Cin, Cout), which is zero at first. It
    is added to an existing weight, so it costs no time.
    """

    def __init__(self, in_channels: int, out_channels: int, place: bool = False):
        super().__init__(in_channels, out_channels)
        self.place = nn.Parameter(torch.zeros(8, in_channels, out_channels)) if place else None

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, Cin) -> (8 N, Cout), child i, j, k of voxel n in row 8 n + 4 i + 2 j + k; `Voxels.child_order` sorts."""
        return _convolve(x, voxels, self._tap_weights(), self.bias, children=8)

    def dense_weights(self) -> Tensor:
        """The weights as `gather_conv` takes them, (27, Cin, 8 Cout)."""
        return dense_weight(self._tap_weights(), 8)

    def _tap_weights(self) -> Tensor:
        """Weights of the 8 taps of each child, (64, Cin, Cout)."""
        weight = children_weight(self.weight)
        if self.place is None:
            return weight
        at_parent = device_constant(tuple(8 * c + 7 - c for c in range(8)), weight.device)  # tap 7 - c of child c
        return weight.index_add(0, at_parent, self.place)


def _convolve(x: Tensor, voxels: Voxels, weight: Tensor, bias: Tensor, children: int) -> Tensor:
    if x.shape != (len(voxels), weight.shape[1]):
        raise ValueError(f"expected features ({len(voxels)}, {weight.shape[1]}), got {tuple(x.shape)}")
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return submanifold_conv(x, voxels.neighbors, weight, bias, children)


def mean_pool(x: Tensor, voxels: Voxels, factor: int) -> tuple[Tensor, Voxels]:
    """Pool the voxels of each factor³ cell: `sum / (count + 1)`.

    The released models count a zero in every mean, which gives this divisor. It is kept everywhere.

    Args:
        x: features (N, C).
        voxels: the voxels of the rows.
        factor: voxels along the edge of a cell.

    Returns:
        Pooled features, dtype of x, summed in at least float32; and their voxels, `voxels.coarsen(factor)[0]`.

    Raises:
        ValueError: if `factor` does not divide the resolution.
    """
    coarse, parent = voxels.coarsen(factor)
    total = segment_sum(x, tokens_of_cells(voxels, factor), parent)
    return (total / (voxels.coarse_counts(factor) + 1)[:, None]).to(x.dtype), coarse


def side_by_side(x: Tensor, voxels: Voxels) -> Tensor:
    """Put the features (N, C) of the 2³ children of every coarse voxel into one row, zero where there is no child.

    Returns (coarse N, 8 C) in the order of `voxels.coarsen(2)[0]`, child i, j, k in columns from (4 i + 2 j + k) C.
    """
    coarse = voxels.coarsen(2)[0]
    return x.new_zeros(8 * len(coarse), x.shape[1]).index_copy(0, voxels.slots, x).view(len(coarse), -1)


class PackedGroupNorm(nn.Module):
    """Group norm of each sample over its tokens and the channels of a group; statistics in at least float32.

    Raises:
        ValueError: if `num_groups` does not divide `channels`.
    """

    def __init__(self, num_groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"expected num_groups that divides {channels} channels, got {num_groups}")
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, voxels: Voxels, silu: bool = False) -> Tensor:
        """(N, C) -> (N, C), dtype of x; with `silu`, SiLU follows the norm."""
        return packed_group_norm(x, self.weight, self.bias, samples_of(voxels), self.num_groups, self.eps, silu)
