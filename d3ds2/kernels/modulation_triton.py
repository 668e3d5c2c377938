"""Triton kernels of the gated residual and of its layer norm with modulation; the definitions are in modulation.py.

A program takes a tile: up to `rows` rows of one sample, whose parameters it reads once. In the backward pass it also
sums the gradients of the parameters over its rows; another kernel adds up the tiles of each sample, in a fixed order.

Sizes named in this file:
    N  rows      B  samples      C  channels
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ragged import Ragged
from .segment_sum_triton import segment_sum_triton


class RowTile(NamedTuple):
    """The rows that a program takes, the numbers that it holds at a time, and its warps."""

    rows: int
    elements: int
    warps: int


NORM = RowTile(4, 4096, 4)
NORM_BACKWARD = RowTile(32, 4096, 4)
SUM_BACKWARD = RowTile(32, 2048, 4)  # of the norm of a sum: it holds two more tensors
GATE = RowTile(4, 4096, 4)
GATE_BACKWARD = RowTile(32, 4096, 4)


@triton.jit
def _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Return the sample of this program's tile, the first row of the tile, and the row after its last."""
    tile = tl.program_id(0)
    if RAGGED:
        sample = tl.minimum(tl.load(tile_samples + tile), B - 1)  # tiles beyond the last have no rows
        first = tl.load(offsets + sample) + (tile - tl.load(tile_offsets + sample)) * ROWS
        last = tl.minimum(first + ROWS, tl.load(offsets + sample + 1))
    else:
        sample = 0
        first = tile * ROWS
        last = tl.minimum(first + ROWS, N)
    return sample, first, last


@triton.jit
def _parameters(x, sample, STRIDE, C: tl.constexpr, CP: tl.constexpr):
    """Load the parameters of one sample, [CP] float32."""
    offs_c = tl.arange(0, CP)
    return tl.load(x + tl.cast(sample, tl.int64) * STRIDE + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)


@triton.jit
def _normed(b_h, is_c, C: tl.constexpr, EPS: tl.constexpr):
    """Return the rows with mean 0 and variance 1, and the factor that made it 1, [BLOCK_N, 1]."""
    centred = tl.where(is_c, b_h - (tl.sum(b_h, 1) / C)[:, None], 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS))[:, None]
    return centred * rstd, rstd


@triton.jit(do_not_specialize=["N", "B"])
def _norm_kernel(
    h, gate, x, shift, scale, total, out, offsets, tile_offsets, tile_samples, N, B,
    GATE_STRIDE, SHIFT_STRIDE, SCALE_STRIDE,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
    EPS: tl.constexpr, ONE: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program: norm(h) (ONE + scale) + shift in a tile. ADDED: h + x is normed, GATED: h + gate x."""
    sample, first, last = _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS, RAGGED)
    offs_c = tl.arange(0, CP)
    b_shift = _parameters(shift, sample, SHIFT_STRIDE, C, CP)
    b_factor = _parameters(scale, sample, SCALE_STRIDE, C, CP) + ONE
    if GATED:
        b_gate = _parameters(gate, sample, GATE_STRIDE, C, CP)
    for i in range(first, last, BLOCK_N):
        row = i + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * C + offs_c
        mask = (row < last)[:, None] & (offs_c < C)
        b_h = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        if ADDED:
            b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                b_x *= b_gate
            rounded = (b_h + b_x).to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=mask)
            b_h = rounded.to(tl.float32)
        normed, _ = _normed(b_h, offs_c < C, C, EPS)
        tl.store(out + at, normed * b_factor + b_shift, mask=mask)


@triton.jit(do_not_specialize=["N", "B"])
def _norm_backward_kernel(
    h, gate, x, scale, dtotal, dout, dh, dx, partial, offsets, tile_offsets, tile_samples, N, B,
    GATE_STRIDE, SCALE_STRIDE,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
    EPS: tl.constexpr, ONE: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, PASSED: tl.constexpr,
):  # fmt: skip
    """One program: dh in a tile, and the parts of dshift, dscale and dgate from its rows -> partial (tiles, 2 or 3, C).

    h is what was normed. PASSED: it has another gradient, dtotal. ADDED: dx gets the gradient of what was added to h.
    """
    sample, first, last = _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS, RAGGED)
    offs_c = tl.arange(0, CP)
    b_factor = _parameters(scale, sample, SCALE_STRIDE, C, CP) + ONE
    b_dshift, b_dscale = tl.zeros([CP], dtype=tl.float32), tl.zeros([CP], dtype=tl.float32)
    if GATED:
        b_gate = _parameters(gate, sample, GATE_STRIDE, C, CP)
        b_dgate = tl.zeros([CP], dtype=tl.float32)
    for i in range(first, last, BLOCK_N):
        row = i + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * C + offs_c
        mask = (row < last)[:, None] & (offs_c < C)
        b_h = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        normed, rstd = _normed(b_h, offs_c < C, C, EPS)
        b_dshift += tl.sum(b_dout, 0)
        b_dscale += tl.sum(b_dout * normed, 0)
        dnormed = b_dout * b_factor
        mean, along = tl.sum(dnormed, 1) / C, tl.sum(dnormed * normed, 1) / C
        b_dh = rstd * (dnormed - mean[:, None] - normed * along[:, None])
        if PASSED:
            b_dh += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + at, b_dh, mask=mask)
        if ADDED:
            if GATED:
                b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                b_dgate += tl.sum(b_dh * b_x, 0)
                b_dh *= b_gate
            tl.store(dx + at, b_dh, mask=mask)
    parts = 3 if GATED else 2
    to = partial + tl.program_id(0).to(tl.int64) * (parts * C) + offs_c
    tl.store(to, b_dshift, mask=offs_c < C)
    tl.store(to + C, b_dscale, mask=offs_c < C)
    if GATED:
        tl.store(to + 2 * C, b_dgate, mask=offs_c < C)


@triton.jit(do_not_specialize=["N", "B"])
def _gate_kernel(
    h, gate, x, out, offsets, tile_offsets, tile_samples, N, B, STRIDE,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program: h + gate x in a tile."""
    sample, first, last = _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS, RAGGED)
    offs_c = tl.arange(0, CP)
    b_gate = _parameters(gate, sample, STRIDE, C, CP)
    for i in range(first, last, BLOCK_N):
        row = i + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * C + offs_c
        mask = (row < last)[:, None] & (offs_c < C)
        b_h = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, b_h + b_gate * b_x, mask=mask)


@triton.jit(do_not_specialize=["N", "B"])
def _gate_backward_kernel(
    gate, x, dout, dx, partial, offsets, tile_offsets, tile_samples, N, B, STRIDE,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program: dx in a tile, and the part of dgate from its rows -> partial (tiles, C)."""
    sample, first, last = _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS, RAGGED)
    offs_c = tl.arange(0, CP)
    b_gate = _parameters(gate, sample, STRIDE, C, CP)
    b_dgate = tl.zeros([CP], dtype=tl.float32)
    for i in range(first, last, BLOCK_N):
        row = i + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * C + offs_c
        mask = (row < last)[:, None] & (offs_c < C)
        b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        b_dgate += tl.sum(b_dout * b_x, 0)
        tl.store(dx + at, b_dout * b_gate, mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * C + offs_c, b_dgate, mask=offs_c < C)


class _SumAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, gate, x, shift, scale, samples, eps, one, total_dtype, dtype):
        ctx.samples, ctx.dtypes = samples, (h.dtype, shift.dtype, scale.dtype)
        ctx.constants = {"EPS": eps, "ONE": one, "ADDED": x is not None, "GATED": gate is not None}
        total = h if x is None else torch.empty_like(h, dtype=total_dtype)
        out = torch.empty_like(h, dtype=dtype)
        grid, tiles, sizes = _launch(h, samples, NORM)
        some = h if x is None else x  # stands for tensors that the kernel leaves alone
        if grid[0]:
            strides = 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0)
            _norm_kernel[grid](
                h, some if gate is None else gate, some, shift, scale, total, out, *tiles, *strides,
                **sizes, **ctx.constants,
            )  # fmt: skip
        ctx.save_for_backward(total, gate, None if gate is None else x, scale)
        ctx.x_dtype = None if x is None else x.dtype
        ctx.set_materialize_grads(False)
        return total.view_as(total) if x is None else total, out

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dout):
        total, gate, x, scale = ctx.saved_tensors
        C, gated, added = total.shape[1], gate is not None, ctx.x_dtype is not None
        dout = torch.zeros_like(total) if dout is None else dout.contiguous()
        dtotal = None if dtotal is None else dtotal.contiguous()
        dh = torch.empty_like(total, dtype=ctx.dtypes[0])
        dx = torch.empty_like(total, dtype=ctx.x_dtype) if added else None
        tile = NORM_BACKWARD if not added else SUM_BACKWARD
        grid, tiles, sizes = _launch(total, ctx.samples, tile)
        partial = torch.empty(*grid, (3 if gated else 2) * C, dtype=torch.float32, device=total.device)
        if grid[0]:
            _norm_backward_kernel[grid](
                total, gate if gated else scale, x if gated else total, scale, total if dtotal is None else dtotal,
                dout, dh, dh if dx is None else dx, partial, *tiles, gate.stride(0) if gated else 0, scale.stride(0),
                **sizes, **ctx.constants, PASSED=dtotal is not None,
            )  # fmt: skip
        dshift, dscale, *dgate = _sum_tiles(partial, ctx.samples, tile).split(C, dim=1)
        dgate = dgate[0].to(gate.dtype) if gated else None
        return dh, dgate, dx, dshift.to(ctx.dtypes[1]), dscale.to(ctx.dtypes[2]), None, None, None, None, None


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, gate, x, samples, dtype):
        ctx.save_for_backward(gate, x)
        ctx.samples, ctx.dtype = samples, h.dtype
        out = torch.empty_like(h, dtype=dtype)
        grid, tiles, sizes = _launch(h, samples, GATE)
        if grid[0]:
            _gate_kernel[grid](h, gate, x, out, *tiles, gate.stride(0), **sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gate, x = ctx.saved_tensors
        dout, dx = dout.contiguous(), torch.empty_like(x)
        grid, tiles, sizes = _launch(x, ctx.samples, GATE_BACKWARD)
        partial = torch.empty(*grid, x.shape[1], dtype=torch.float32, device=x.device)
        if grid[0]:
            _gate_backward_kernel[grid](gate, x, dout, dx, partial, *tiles, gate.stride(0), **sizes)
        dgate = _sum_tiles(partial, ctx.samples, GATE_BACKWARD)
        return dout.to(ctx.dtype), dgate.to(gate.dtype), dx, None, None


def sum_and_norm_triton(
    h: Tensor, gate: Tensor | None, x: Tensor | None, shift: Tensor, scale: Tensor, samples: Ragged, eps: float,
    total_dtype: torch.dtype, dtype: torch.dtype, affine: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum_and_norm` of h (N, C), with the sum in `total_dtype` and its norm in `dtype`: (N, C) each.

    If `affine`, the factor of the norm is `scale` itself, without 1.
    """
    gate, x = None if gate is None else _packed(gate), None if x is None else x.contiguous()
    one = 0.0 if affine else 1.0
    return _SumAndNorm.apply(
        h.contiguous(), gate, x, _packed(shift), _packed(scale), _several(samples), eps, one, total_dtype, dtype
    )


def affine_norm_triton(h: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`affine_norm` of h (..., C) with a result of `dtype`: (..., C)."""
    rows = h.reshape(-1, h.shape[-1]).contiguous()
    parameters = _packed(bias[None]), _packed(weight[None])
    return _SumAndNorm.apply(rows, None, None, *parameters, None, eps, 0.0, rows.dtype, dtype)[1].view(h.shape)


def gated_sum_triton(h: Tensor, gate: Tensor, x: Tensor, samples: Ragged, dtype: torch.dtype) -> Tensor:
    """`gated_sum` of h and x (N, C) with a result of `dtype`: (N, C)."""
    return _GatedSum.apply(h.contiguous(), _packed(gate), x.contiguous(), _several(samples), dtype)


def _several(samples: Ragged) -> Ragged | None:
    """Return the samples, or None for a single one: the kernels then read no tables."""
    return None if len(samples) == 1 else samples


def _packed(x: Tensor) -> Tensor:
    """Return x with the channels of a row side by side. Rows may lie apart, as those of `chunk` do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(x: Tensor, samples: Ragged | None, tile: RowTile) -> tuple[tuple[int], tuple, dict]:
    """Return the grid, the tables that assign the rows of x (N, C) to samples, and the compile-time sizes."""
    N, C = x.shape
    CP = triton.next_power_of_2(C)
    BLOCK_N = min(tile.rows, max(1, tile.elements // CP))
    sizes = {"C": C, "CP": CP, "ROWS": tile.rows, "BLOCK_N": BLOCK_N, "RAGGED": samples is not None}
    sizes["num_warps"] = tile.warps
    if samples is None:
        return (triton.cdiv(N, tile.rows),), (x, x, x, N, 1), sizes  # the first three are not read
    tile_offsets, tile_samples = samples.tiles(tile.rows)
    return (len(tile_samples),), (samples.offsets, tile_offsets, tile_samples, N, len(samples)), sizes


def _sum_tiles(partial: Tensor, samples: Ragged | None, tile: RowTile) -> Tensor:
    """Sum the tiles of each sample: (tiles, C) -> (B, C) float32."""
    if samples is None:
        return partial.sum(0, keepdim=True)
    return segment_sum_triton(partial, Ragged(samples.tiles(tile.rows)[0], len(partial)))
