"""Sums of segments of rows, and rows taken back from the sums: each operation is the gradient of the other.

`segment_sum` and `take_segments` serve many short segments in any order. `sample_sums`, `sample_means` and `per_token`
serve the few long segments of a batch, its samples, whose rows are consecutive.

Sizes named in this file:
    N  rows      S  segments      C  channels
    B  samples, the segments of a batch
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import half_on_triton, on_cuda, without_autocast
from .gather_conv import take_rows
from .ragged import Ragged

COPY_BYTES = 64 << 20  # of columns in float32 at a time


def segment_sum(x: Tensor, segments: Ragged, segment_of_row: Tensor) -> Tensor:
    """Sum the rows of x (N, C) in each segment: (S, C), at least float32; on CUDA in a fixed order.

    Every row lies in one segment, which `segment_of_row` (N,) long names.
    """
    return _SegmentSum.apply(x, segments, segment_of_row)


def take_segments(x: Tensor, segments: Ragged, segment_of_row: Tensor) -> Tensor:
    """x[segment_of_row] for x (S, C): (N, C)."""
    return _TakeSegments.apply(x, segments, segment_of_row)


def segment_sum_reference(x: Tensor, segments: Ragged, segment_of_row: Tensor) -> Tensor:
    """Definition of `segment_sum`, without a gradient."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(len(segments), x.shape[1], dtype=dtype, device=x.device)
    return sums.index_add_(0, segment_of_row, x.to(dtype))


def segment_sum_bags(x: Tensor, segments: Ragged) -> Tensor:
    """`segment_sum` of N > 0 rows by torch alone, without a gradient: in a fixed order, some columns at a time."""
    ids = segments.ids
    if ids is None:
        ids = torch.arange(len(x), dtype=torch.int32, device=x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_columns = x.shape[1] if x.dtype == dtype else max(8, COPY_BYTES // (len(x) * dtype.itemsize))
    bags = {"offsets": segments.offsets, "mode": "sum", "include_last_offset": True}
    parts = [
        torch.nn.functional.embedding_bag(ids, columns.to(dtype).contiguous(), **bags)
        for columns in x.split(num_columns, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def per_token(x: Tensor, samples: Ragged) -> Tensor:
    """Give every token the row of its sample: (B, C) -> (N, C), or (1, C) where there is one sample."""
    return x if len(samples) == 1 else _PerToken.apply(x, samples)


def sample_sums(x: Tensor, samples: Ragged) -> Tensor:
    """Sum over the tokens of each sample, (N, C) -> (B, C)."""
    if on_cuda(x) and len(samples) > 1:  # one product instead of B launches; TF32 rounds it if torch allows that
        with without_autocast(x.device):
            return samples.membership @ x.float()
    return torch.stack([rows.sum(0) for rows in x.split(samples.lengths)])


def sample_means(x: Tensor, samples: Ragged) -> Tensor:
    """Mean over the tokens of each sample, (N, C) -> (B, C); 0 for an empty sample."""
    return sample_sums(x, samples) / samples.divisors


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, segments, segment_of_row):
        ctx.save_for_backward(segment_of_row)
        ctx.dtype = x.dtype
        return _sum(x, segments, segment_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (segment_of_row,) = ctx.saved_tensors
        return take_rows(dout.to(ctx.dtype), segment_of_row), None, None


class _TakeSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, segments, segment_of_row):
        ctx.save_for_backward(segment_of_row)
        ctx.segments = segments
        return take_rows(x, segment_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (segment_of_row,) = ctx.saved_tensors
        return _sum(dout, ctx.segments, segment_of_row).to(dout.dtype), None, None


class _PerToken(torch.autograd.Function):
    """Expand the row of each sample. The backward pass sums them: a general gather would sort, or add atomically."""

    @staticmethod
    def forward(ctx, x, samples):
        ctx.samples = samples
        return torch.cat([row.expand(n, -1) for row, n in zip(x.split(1), samples.lengths, strict=True)])

    @staticmethod
    def backward(ctx, dout):
        return sample_sums(dout, ctx.samples), None


def _sum(x: Tensor, segments: Ragged, segment_of_row: Tensor) -> Tensor:
    if half_on_triton(x):
        from .segment_sum_triton import segment_sum_triton

        return segment_sum_triton(x, segments)
    if x.device.type in ("cpu", "cuda") and x.numel() and not torch.compiler.is_compiling():
        return segment_sum_bags(x, segments)
    return segment_sum_reference(x, segments, segment_of_row)
