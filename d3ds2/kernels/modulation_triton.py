"""Triton kernels of layer norm with modulation and of the gated residual; the definitions are in modulation.py.

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


@triton.jit
def _norm_kernel(
    h, shift, scale, out, offsets, tile_offsets, tile_samples, N, B, SHIFT_STRIDE, SCALE_STRIDE,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
    EPS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One program: norm(h) (ONE + scale) + shift in a tile."""
    sample, first, last = _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS, RAGGED)
    offs_c = tl.arange(0, CP)
    b_shift = _parameters(shift, sample, SHIFT_STRIDE, C, CP)
    b_factor = _parameters(scale, sample, SCALE_STRIDE, C, CP) + ONE
    for i in range(first, last, BLOCK_N):
        row = i + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * C + offs_c
        mask = (row < last)[:, None] & (offs_c < C)
        b_h = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        normed, _ = _normed(b_h, offs_c < C, C, EPS)
        tl.store(out + at, normed * b_factor + b_shift, mask=mask)


@triton.jit
def _norm_backward_kernel(
    h, scale, dout, dh, partial, offsets, tile_offsets, tile_samples, N, B, SCALE_STRIDE,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
    EPS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One program: dh in a tile, and the parts of dshift and dscale from its rows -> partial (tiles, 2, C)."""
    sample, first, last = _rows_of_tile(offsets, tile_offsets, tile_samples, N, B, ROWS, RAGGED)
    offs_c = tl.arange(0, CP)
    b_factor = _parameters(scale, sample, SCALE_STRIDE, C, CP) + ONE
    b_dshift, b_dscale = tl.zeros([CP], dtype=tl.float32), tl.zeros([CP], dtype=tl.float32)
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
        tl.store(dh + at, rstd * (dnormed - mean[:, None] - normed * along[:, None]), mask=mask)
    to = partial + tl.program_id(0).to(tl.int64) * (2 * C) + offs_c
    tl.store(to, b_dshift, mask=offs_c < C)
    tl.store(to + C, b_dscale, mask=offs_c < C)


@triton.jit
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


@triton.jit
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


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, shift, scale, samples, eps, one, dtype):
        ctx.save_for_backward(h, shift, scale)
        ctx.samples, ctx.constants = samples, {"EPS": eps, "ONE": one}
        out = torch.empty_like(h, dtype=dtype)
        grid, tiles, sizes = _launch(h, samples, NORM)
        if grid[0]:
            strides = shift.stride(0), scale.stride(0)
            _norm_kernel[grid](h, shift, scale, out, *tiles, *strides, **sizes, **ctx.constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        h, shift, scale = ctx.saved_tensors
        dout, dh, C = dout.contiguous(), torch.empty_like(h), h.shape[1]
        grid, tiles, sizes = _launch(h, ctx.samples, NORM_BACKWARD)
        partial = torch.empty(*grid, 2 * C, dtype=torch.float32, device=h.device)
        if grid[0]:
            _norm_backward_kernel[grid](h, scale, dout, dh, partial, *tiles, scale.stride(0), **sizes, **ctx.constants)
        dshift, dscale = _sum_tiles(partial, ctx.samples, NORM_BACKWARD).split(C, dim=1)
        return dh, dshift.to(shift.dtype), dscale.to(scale.dtype), None, None, None, None


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


def modulated_norm_triton(
    h: Tensor, shift: Tensor, scale: Tensor, samples: Ragged, eps: float, dtype: torch.dtype
) -> Tensor:
    """`modulated_norm` of h (N, C) with a result of `dtype`: (N, C)."""
    return _ModulatedNorm.apply(h.contiguous(), _packed(shift), _packed(scale), _several(samples), eps, 1.0, dtype)


def affine_norm_triton(h: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`affine_norm` of h (..., C) with a result of `dtype`: (..., C)."""
    rows = h.reshape(-1, h.shape[-1]).contiguous()
    return _ModulatedNorm.apply(rows, _packed(bias[None]), _packed(weight[None]), None, eps, 0.0, dtype).view(h.shape)


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
