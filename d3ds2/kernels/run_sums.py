"""Sums of runs of rows, and the rows taken back from them: each is the gradient of the other.

Sizes named in this file:
    N  rows      R  runs      C  channels
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .runs import HAS_TRITON, Runs


def sum_runs(x: Tensor, runs: Runs, run_of_row: Tensor) -> Tensor:
    """The rows of x (N, C) summed run by run, in a fixed order on CUDA: (R, C), at least float32.

    Every row is in one run: `run_of_row` (N,) long says in which.
    """
    return _SumRuns.apply(x, runs, run_of_row)


def take_runs(x: Tensor, runs: Runs, run_of_row: Tensor) -> Tensor:
    """x[run_of_row], of x (R, C): (N, C)."""
    return _TakeRuns.apply(x, runs, run_of_row)


class _SumRuns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, runs, run_of_row):
        ctx.save_for_backward(run_of_row)
        ctx.dtype = x.dtype
        return _sum(x, runs, run_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (run_of_row,) = ctx.saved_tensors
        return _take(dout.to(ctx.dtype), run_of_row), None, None


class _TakeRuns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, runs, run_of_row):
        ctx.save_for_backward(run_of_row)
        ctx.runs = runs
        return _take(x, run_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (run_of_row,) = ctx.saved_tensors
        return _sum(dout, ctx.runs, run_of_row).to(dout.dtype), None, None


def _sum(x: Tensor, runs: Runs, run_of_row: Tensor) -> Tensor:
    if x.is_cuda and HAS_TRITON and x.dtype != torch.float64:
        from .run_sums_triton import sum_runs_triton

        return sum_runs_triton(x, runs)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(len(runs), x.shape[1], dtype=dtype, device=x.device).index_add_(0, run_of_row, x.to(dtype))


def _take(x: Tensor, run_of_row: Tensor) -> Tensor:
    if x.is_cuda and HAS_TRITON:
        from .gather_conv_triton import take_rows_triton

        return take_rows_triton(x, run_of_row)
    return x.index_select(0, run_of_row)
