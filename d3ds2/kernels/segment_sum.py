"""Sums of runs of rows, and the rows taken back from them: each is the gradient of the other.

Sizes named in this file:
    N  rows      R  runs      C  channels
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import HAS_TRITON
from .ragged import Ragged


def segment_sum(x: Tensor, runs: Ragged, segment_of_row: Tensor) -> Tensor:
    """The rows of x (N, C) summed run by run, in a fixed order on CUDA: (R, C), at least float32.

    Every row is in one run: `segment_of_row` (N,) long says in which.
    """
    return _SegmentSum.apply(x, runs, segment_of_row)


def take_segments(x: Tensor, runs: Ragged, segment_of_row: Tensor) -> Tensor:
    """x[segment_of_row], of x (R, C): (N, C)."""
    return _TakeSegments.apply(x, runs, segment_of_row)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, runs, segment_of_row):
        ctx.save_for_backward(segment_of_row)
        ctx.dtype = x.dtype
        return _sum(x, runs, segment_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (segment_of_row,) = ctx.saved_tensors
        return _take(dout.to(ctx.dtype), segment_of_row), None, None


class _TakeSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, runs, segment_of_row):
        ctx.save_for_backward(segment_of_row)
        ctx.runs = runs
        return _take(x, segment_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (segment_of_row,) = ctx.saved_tensors
        return _sum(dout, ctx.runs, segment_of_row).to(dout.dtype), None, None


def _sum(x: Tensor, runs: Ragged, segment_of_row: Tensor) -> Tensor:
    if x.is_cuda and HAS_TRITON and x.dtype != torch.float64:
        from .segment_sum_triton import segment_sum_triton

        return segment_sum_triton(x, runs)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(len(runs), x.shape[1], dtype=dtype, device=x.device).index_add_(0, segment_of_row, x.to(dtype))


def _take(x: Tensor, segment_of_row: Tensor) -> Tensor:
    if x.is_cuda and HAS_TRITON:
        from .gather_conv_triton import take_rows_triton

        return take_rows_triton(x, segment_of_row)
    return x.index_select(0, segment_of_row)
