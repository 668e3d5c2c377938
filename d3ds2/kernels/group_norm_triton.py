"""Triton kernels of the group norm of packed samples; the definition is in group_norm.py.

One launch serves T tensors of the same shape. The samples are cut into tiles of rows. A first kernel computes the mean
and the sum of squared deviations of each channel in each tile; a second merges them for each sample and group. So no
digits cancel, though the rows are read once, and the order of all sums is fixed.

Sizes named in this file:
    T  tensors      N  rows of each      B  samples      C  channels      G  groups of channels
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import abilities
from .ragged import Ragged

PROGRAMS = 8  # programs of a multiprocessor that a launch aims at
MIN_TILE, MAX_BLOCK_N, MAX_BLOCK_C = 32, 64, 64  # rows of a tile; rows and channels at a time
MERGED_NUMBERS = 2048  # that a program merges at a time


@dataclass(frozen=True)
class Pooled:
    """The cells of a `mean_pool` that follows the norm, for the gradient that comes through it.

    Args:
        parent: cell of each row, (N,) long.
        cells: rows of each cell.
        skip: gradient of the means of x itself over cells, (T, cells, C); the gradient of x contains it.
    """

    parent: Tensor
    cells: Ragged
    skip: Tensor


@triton.jit
def _tile_rows(offsets, tile_offsets, tile_samples, B, SIZE):
    """Return the sample of this program's tile, its first row, and the row after its last.

    Tiles beyond the last have no rows.
    """
    tile = tl.program_id(0)
    loaded = tl.load(tile_samples + tile)
    sample = tl.minimum(loaded, B - 1)
    first = tl.load(offsets + sample) + (tile - tl.load(tile_offsets + sample)) * SIZE
    last = tl.minimum(first + SIZE, tl.load(offsets + sample + 1))
    return sample, first, tl.where(loaded < B, last, first)


@triton.jit
def silu_gradient(z):
    """Return the derivative of SiLU at z."""
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit(do_not_specialize=["B", "N"])
def _statistics_kernel(
    x, keys, values, position, place, offsets, tile_offsets, tile_samples, partial, B, N, SIZE,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """One program: mean and sum of squared deviations of each channel in one tile -> partial (tiles, T, 2, C).

    With JOIN, the program first writes x: tensor 0 is keys + position[place], tensor 1 is values.
    """
    tensor = tl.program_id(2).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_c = offs_c < C
    _, begin, end = _tile_rows(offsets, tile_offsets, tile_samples, B, SIZE)
    mean, deviations = tl.zeros([BLOCK_C], dtype=tl.float32), tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        valid = row < end
        mask = valid[:, None] & is_c
        at = row[:, None] * C + offs_c
        if JOIN:
            if tensor == 0:
                b_place = tl.load(place + row, mask=valid, other=0)
                b_x = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
                b_x += tl.load(position + b_place[:, None] * C + offs_c, mask=mask, other=0.0).to(tl.float32)
            else:
                b_x = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
            rounded = b_x.to(x.dtype.element_ty)
            tl.store(x + tensor * N * C + at, rounded, mask=mask)
            b_x = rounded.to(tl.float32)
        else:
            b_x = tl.load(x + tensor * N * C + at, mask=mask, other=0.0).to(tl.float32)
        before, count = (first - begin).to(tl.float32), tl.minimum(end - first, BLOCK_N).to(tl.float32)
        b_mean = tl.sum(b_x, 0) / count
        centred = tl.where(mask, b_x - b_mean[None, :], 0.0)
        delta = b_mean - mean
        mean += delta * (count / (before + count))
        deviations += tl.sum(centred * centred, 0) + delta * delta * (before * count / (before + count))
    to = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tensor) * 2 * C + offs_c
    tl.store(partial + to, mean, mask=is_c)
    tl.store(partial + to + C, deviations, mask=is_c)


@triton.jit
def _merge_statistics_kernel(
    partial, offsets, tile_offsets, statistics, eps, SIZE,
    C: tl.constexpr, G: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_G groups of J channels of one sample -> statistics (2, T, B, G): mean and 1 / deviation."""
    sample, tensor = tl.program_id(0), tl.program_id(2).to(tl.int64)
    B, T = tl.num_programs(0), tl.num_programs(2)
    offs_g, offs_j = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_J)
    channel = offs_g[:, None] * J + offs_j[None, :]  # [BLOCK_G, BLOCK_J]
    is_channel = (offs_g < G)[:, None] & (offs_j < J)[None, :]
    begin, end = tl.load(tile_offsets + sample), tl.load(tile_offsets + sample + 1)
    rows = tl.load(offsets + sample + 1) - tl.load(offsets + sample)
    numbers = tl.maximum(rows, 1).to(tl.float32) * J
    mean = tl.zeros([BLOCK_G], dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(rows - (tile - begin) * SIZE, SIZE), 0).to(tl.float32)
        at = partial + (tile.to(tl.int64) * T + tensor)[:, None, None] * 2 * C + channel[None, :, :]
        mask = (tile < end)[:, None, None] & is_channel[None, :, :]
        means = tl.load(at, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_G, BLOCK_J]
        mean += tl.sum(tl.sum(means * count[:, None, None], 2), 0) / numbers
    deviations = tl.zeros([BLOCK_G], dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(rows - (tile - begin) * SIZE, SIZE), 0).to(tl.float32)
        at = partial + (tile.to(tl.int64) * T + tensor)[:, None, None] * 2 * C + channel[None, :, :]
        mask = (tile < end)[:, None, None] & is_channel[None, :, :]
        delta = tl.load(at, mask=mask, other=0.0) - mean[None, :, None]
        within = tl.load(at + C, mask=mask, other=0.0)
        both = tl.where(mask, within + delta * delta * count[:, None, None], 0.0)
        deviations += tl.sum(tl.sum(both, 2), 0)
    to = statistics + (tensor * B + sample) * G + offs_g
    tl.store(to, mean, mask=offs_g < G)
    tl.store(to + T * B * G, 1 / tl.sqrt(deviations / numbers + eps), mask=offs_g < G)


@triton.jit(do_not_specialize=["B", "N"])
def _normalize_kernel(
    x, statistics, weight, bias, out, offsets, tile_offsets, tile_samples, B, N, SIZE,
    C: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: the norm of one tile, with SILU followed by SiLU."""
    tensor = tl.program_id(2).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_c = offs_c < C
    sample, begin, end = _tile_rows(offsets, tile_offsets, tile_samples, B, SIZE)
    group = statistics + (tensor * B + sample) * G + offs_c // (C // G)
    mean = tl.load(group, mask=is_c, other=0.0)
    rstd = tl.load(group + tl.num_programs(2) * B * G, mask=is_c, other=0.0)
    scale = tl.load(weight + tensor * C + offs_c, mask=is_c, other=0.0).to(tl.float32) * rstd
    shift = tl.load(bias + tensor * C + offs_c, mask=is_c, other=0.0).to(tl.float32)
    for first in range(begin, end, BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (row < end)[:, None] & is_c
        at = (tensor * N + row)[:, None] * C + offs_c
        b_y = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * scale + shift
        if SILU:
            b_y = b_y * tl.sigmoid(b_y)
        tl.store(out + at, b_y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "N", "M"])
def _gradient_kernel(
    x, statistics, weight, bias, dy, parent, cells, skip, group_means, partial, dx,
    offsets, tile_offsets, tile_samples, B, N, M, SIZE,
    C: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    SILU: tl.constexpr, POOLED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program: a step of the gradient in one tile.

    With SUM, it sums dy and dy times the normed x over the rows -> partial (tiles, T, 2, C). Without SUM, it computes
    dx from the means of the same two over each group, `group_means` (2, T, B, G).

    dy is the gradient of the norm; with SILU, that of SiLU(norm); with POOLED, that of its mean over each of M cells.
    `skip` is then the gradient of the mean of x over each cell.
    """
    tensor = tl.program_id(2).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_c = offs_c < C
    sample, begin, end = _tile_rows(offsets, tile_offsets, tile_samples, B, SIZE)
    at_group = (tensor * B + sample) * G + offs_c // (C // G)
    second = tl.num_programs(2) * B * G
    mean = tl.load(statistics + at_group, mask=is_c, other=0.0)
    rstd = tl.load(statistics + at_group + second, mask=is_c, other=0.0)
    scale = tl.load(weight + tensor * C + offs_c, mask=is_c, other=0.0).to(tl.float32)
    shift = tl.load(bias + tensor * C + offs_c, mask=is_c, other=0.0).to(tl.float32)
    sum_dy, sum_dy_normed = tl.zeros([BLOCK_C], dtype=tl.float32), tl.zeros([BLOCK_C], dtype=tl.float32)
    if not SUM:
        mean_dy = tl.load(group_means + at_group, mask=is_c, other=0.0)
        mean_dy_normed = tl.load(group_means + at_group + second, mask=is_c, other=0.0)
    for first in range(begin, end, BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        valid = row < end
        mask = valid[:, None] & is_c
        at = (tensor * N + row)[:, None] * C + offs_c
        normed = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if POOLED:
            cell = tl.load(parent + row, mask=valid, other=0)
            count = tl.load(cells + cell + 1, mask=valid, other=0) - tl.load(cells + cell, mask=valid, other=0)
            share = 1 / (count + 1).to(tl.float32)
            at_cell = (tensor * M + cell)[:, None] * C + offs_c
            b_dy = tl.load(dy + at_cell, mask=mask, other=0.0).to(tl.float32) * share[:, None]
        else:
            b_dy = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            b_dy = b_dy * silu_gradient(normed * scale + shift)
        if SUM:
            sum_dy += tl.sum(b_dy, 0)
            sum_dy_normed += tl.sum(b_dy * normed, 0)
        else:
            b_dx = (b_dy * scale - mean_dy - normed * mean_dy_normed) * rstd
            if POOLED:
                b_dx += tl.load(skip + at_cell, mask=mask, other=0.0).to(tl.float32) * share[:, None]
            tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=mask)
    if SUM:
        to = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tensor) * 2 * C + offs_c
        tl.store(partial + to, sum_dy, mask=is_c)
        tl.store(partial + to + C, sum_dy_normed, mask=is_c)


@triton.jit(do_not_specialize=["B"])
def _merge_sums_kernel(
    partial, offsets, tile_offsets, weight, group_means, dweight, dbias, B,
    C: tl.constexpr, G: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_G groups of sample b -> group_means (2, T, B, G), or of all samples -> dweight, dbias (T, C).

    Program B takes all samples.
    """
    sample, tensor = tl.program_id(0), tl.program_id(2).to(tl.int64)
    T = tl.num_programs(2)
    offs_g, offs_j = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_J)
    channel = offs_g[:, None] * J + offs_j[None, :]  # [BLOCK_G, BLOCK_J]
    is_channel = (offs_g < G)[:, None] & (offs_j < J)[None, :]
    of_one = tl.minimum(sample, B - 1)
    begin = tl.where(sample == B, 0, tl.load(tile_offsets + of_one))
    end = tl.load(tile_offsets + of_one + 1)
    dy = tl.zeros([BLOCK_G, BLOCK_J], dtype=tl.float32)
    dy_normed = tl.zeros([BLOCK_G, BLOCK_J], dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        at = partial + (tile.to(tl.int64) * T + tensor)[:, None, None] * 2 * C + channel[None, :, :]
        mask = (tile < end)[:, None, None] & is_channel[None, :, :]
        dy += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        dy_normed += tl.sum(tl.load(at + C, mask=mask, other=0.0), 0)
    # zero already; but Triton 3.1 aborts where the sum of a loop has more than one use
    dy, dy_normed = tl.where(is_channel, dy, 0.0), tl.where(is_channel, dy_normed, 0.0)
    at_channel = tensor * C + channel
    if sample == B:
        tl.store(dbias + at_channel, dy.to(dbias.dtype.element_ty), mask=is_channel)
        tl.store(dweight + at_channel, dy_normed.to(dweight.dtype.element_ty), mask=is_channel)
    else:
        rows = tl.load(offsets + sample + 1) - tl.load(offsets + sample)
        numbers = tl.maximum(rows, 1).to(tl.float32) * J
        b_w = tl.load(weight + at_channel, mask=is_channel, other=0.0).to(tl.float32)
        to = group_means + (tensor * B + sample) * G + offs_g
        tl.store(to, tl.sum(dy * b_w, 1) / numbers, mask=offs_g < G)
        tl.store(to + T * B * G, tl.sum(dy_normed * b_w, 1) / numbers, mask=offs_g < G)


class _Tiling:
    """The tiles of the rows, and the sizes of the kernels that work on tiles and of those that merge them."""

    def __init__(self, x: Tensor, samples: Ragged, num_groups: int):
        T, N, C = x.shape
        BLOCK_C = min(MAX_BLOCK_C, triton.next_power_of_2(C))
        columns = triton.cdiv(C, BLOCK_C)
        programs = PROGRAMS * abilities(x.device).multiprocessors
        self.size = max(MIN_TILE, triton.next_power_of_2(triton.cdiv(N * T * columns, programs)))
        self.tile_offsets, tile_samples = samples.tiles(self.size)
        self.tables = samples.offsets, self.tile_offsets, tile_samples
        self.grid = len(tile_samples), columns, T
        self.blocks = {"BLOCK_N": min(MAX_BLOCK_N, self.size), "BLOCK_C": BLOCK_C}
        J = C // num_groups
        BLOCK_J = triton.next_power_of_2(J)
        BLOCK_G = min(max(1, 16 // BLOCK_J), triton.next_power_of_2(num_groups))
        self.merging = {"J": J, "BLOCK_J": BLOCK_J, "BLOCK_G": BLOCK_G}
        self.merging["BLOCK_T"] = max(1, min(128, MERGED_NUMBERS // (BLOCK_J * BLOCK_G)))
        self.group_blocks = triton.cdiv(num_groups, BLOCK_G)

    def partial(self, x: Tensor) -> Tensor:
        """Return memory for two numbers of each tile and channel of x (T, N, C): (tiles, T, 2, C) float32."""
        return torch.empty(self.grid[0], x.shape[0], 2, x.shape[2], dtype=torch.float32, device=x.device)


def group_norm_statistics(
    x: Tensor, samples: Ragged, num_groups: int, eps: float, joined: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """Compute mean and 1 / deviation of x (T, N, C) in each sample and group: (2, T, B, G) float32.

    With `joined` = keys (N, C), values (N, C), position (P, C) and place (N,) long, T is 2, and the kernel first writes
    keys + position[place] and values into x.
    """
    (T, N, C), B = x.shape, len(samples)
    statistics = torch.empty(2, T, B, num_groups, dtype=torch.float32, device=x.device)
    tiling = _Tiling(x, samples, num_groups)
    partial = tiling.partial(x)
    _statistics_kernel[tiling.grid](
        x, *(joined or (x, x, x, x)), *tiling.tables, partial, B, N, tiling.size,
        C=C, JOIN=joined is not None, **tiling.blocks,
    )  # fmt: skip
    _merge_statistics_kernel[B, tiling.group_blocks, T](
        partial, samples.offsets, tiling.tile_offsets, statistics, eps, tiling.size,
        C=C, G=num_groups, **tiling.merging,
    )  # fmt: skip
    return statistics


def group_norm_apply(
    x: Tensor, samples: Ragged, statistics: Tensor, weight: Tensor, bias: Tensor, silu: bool, out: Tensor
) -> None:
    """Write the norm of x (T, N, C) with weight and bias (T, C), then SiLU if `silu`, into `out` (T, N, C)."""
    (_, N, C), G = x.shape, statistics.shape[3]
    tiling = _Tiling(x, samples, G)
    _normalize_kernel[tiling.grid](
        x, statistics, weight, bias, out, *tiling.tables, len(samples), N, tiling.size,
        C=C, G=G, SILU=silu, **tiling.blocks,
    )  # fmt: skip


def group_norm_backward(
    dy: Tensor, x: Tensor, samples: Ragged, statistics: Tensor, weight: Tensor, bias: Tensor, silu: bool,
    dx: Tensor, dweight: Tensor, dbias: Tensor, pooled: Pooled | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `group_norm_apply` into dx (T, N, C), dweight and dbias (T, C), of any floating dtype.

    dy is the gradient of its result, (T, N, C), or with `pooled` that of the means over cells, (T, cells, C).
    """
    (T, N, C), B, G = x.shape, len(samples), statistics.shape[3]
    tiling = _Tiling(x, samples, G)
    partial, group_means = tiling.partial(x), torch.empty_like(statistics)
    parent, cells, skip = (dy, dy, dy) if pooled is None else (pooled.parent, pooled.cells.offsets, pooled.skip)
    inputs = x, statistics, weight, bias, dy, parent, cells, skip, group_means, partial, dx
    sizes = *tiling.tables, B, N, dy.shape[1], tiling.size
    kinds = {"C": C, "G": G, "SILU": silu, "POOLED": pooled is not None, **tiling.blocks}
    _gradient_kernel[tiling.grid](*inputs, *sizes, SUM=True, **kinds)
    _merge_sums_kernel[B + 1, tiling.group_blocks, T](
        partial, samples.offsets, tiling.tile_offsets, weight, group_means, dweight, dbias, B,
        C=C, G=G, **tiling.merging,
    )  # fmt: skip
    _gradient_kernel[tiling.grid](*inputs, *sizes, SUM=False, **kinds)


class _GroupNorm(torch.autograd.Function):
    """Keeps x and the statistics for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, samples, num_groups, eps, silu):
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        statistics = group_norm_statistics(x[None], samples, num_groups, eps)
        group_norm_apply(x[None], samples, statistics, weight, bias, silu, out[None])
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.samples, ctx.silu = samples, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, statistics = ctx.saved_tensors
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        group_norm_backward(
            dy.contiguous()[None], x[None], ctx.samples, statistics, weight, bias, ctx.silu, dx[None], dweight, dbias
        )
        return dx, dweight, dbias, None, None, None, None


def group_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, samples: Ragged, num_groups: int, eps: float, silu: bool = False
) -> Tensor:
    """`packed_group_norm` of x (N, C) with sums in float32: (N, C)."""
    return _GroupNorm.apply(x, weight, bias, samples, num_groups, eps, silu)
