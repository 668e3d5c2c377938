"""Triton kernels of convolutions of a dense volume of few channels; the definitions are in volume_conv.py.

A volume is a matrix of rows: voxel (x, y, z) is row (x Y + y) Z + z. A convolution reads the 27 neighbours where they
lie, of two volumes if it has two inputs, and applies norm and SiLU to what it reads. So only results are stored.

A number of channels that is a multiple of 16 is an argument of the kernel. For any other number, a kernel is compiled
(`FIXED`). Either way a row is read in wide words.

Sizes named in this file:
    V  voxels, X · Y · Z      C, D  channels of the first and the second input      M  channels of the result
    S  slices of the voxels, for statistics
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import abilities

BLOCK_N = 128  # voxels at a time
STAGES = 3  # loads in flight
SLICE = 8192  # voxels whose moments one program computes


@triton.jit
def _load_rows(x, row, found, first, C, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """Load x[row, first : first + BLOCK], zero where not found; also return which of the channels exist."""
    c = first + tl.arange(0, BLOCK)
    if FIXED > 0:
        base, has_channel = row * FIXED, c < FIXED
        return tl.load(
            x + base[:, None] + c[None, :], mask=found[:, None] & has_channel[None, :], other=0.0
        ), has_channel
    base = tl.multiple_of(row * C, 16)
    return tl.load(x + base[:, None] + c[None, :], mask=found[:, None], other=0.0), c >= 0


@triton.jit
def _source(
    acc, x, scale, shift, weight, row, found, k, before, C, ALL, M, offs_m,
    NORM: tl.constexpr, FIXED: tl.constexpr, FIXED_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return acc + x[row] @ weight[k, before : before + C]; with NORM, SiLU(x · scale + shift) stands for x."""
    for first in range(0, C, BLOCK):
        c = before + first + tl.arange(0, BLOCK)
        b_x, has_channel = _load_rows(x, row, found, first, C, FIXED, BLOCK)
        if NORM:
            b_scale = tl.load(scale + c, mask=has_channel, other=0.0)
            b_shift = tl.load(shift + c, mask=has_channel, other=0.0)
            h = b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]
            b_x = tl.where(found[:, None], h * tl.sigmoid(h), 0.0).to(b_x.dtype)
        place = (k * ALL + c).to(tl.int64)
        if FIXED_M > 0:
            place, valid = place * FIXED_M, has_channel[:, None] & (offs_m < FIXED_M)[None, :]
        else:
            place, valid = tl.multiple_of(place * M, 16), has_channel[:, None] & (offs_m >= 0)[None, :]
        b_w = tl.load(weight + place[:, None] + offs_m[None, :], mask=valid, other=0.0)
        acc += tl.dot(b_x, b_w, input_precision="ieee")
    return acc


@triton.jit
def _neighbor(n, i, j, l, X, Y, Z):  # noqa: E741
    """Return the rows of the neighbours of voxels n at an offset, and whether they lie in the volume."""
    at_z, at_y, at_x = n % Z + l, n // Z % Y + j, n // Z // Y + i
    found = (at_x >= 0) & (at_x < X) & (at_y >= 0) & (at_y < Y) & (at_z >= 0) & (at_z < Z)
    return (n + (i * Y + j) * Z + l).to(tl.int64), found & (n < X * Y * Z)


@triton.jit(do_not_specialize=["X", "Y", "Z", "C", "D", "M"])
def _conv_kernel(
    x, y, scale, shift, weight, bias, residual, out, X, Y, Z, C, D, M,
    EDGE: tl.constexpr, NORM: tl.constexpr, HAS_Y: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    FIXED_C: tl.constexpr, FIXED_D: tl.constexpr, FIXED_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N voxels and BLOCK_M channels of the result. The weights cover EDGE³ voxels, 1³ or 3³."""
    n, offs_m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(EDGE * EDGE * EDGE):
        i, j, l = k // (EDGE * EDGE) - EDGE // 2, k // EDGE % EDGE - EDGE // 2, k % EDGE - EDGE // 2  # noqa: E741
        row, found = _neighbor(n, i, j, l, X, Y, Z)
        acc = _source(
            acc, x, scale, shift, weight, row, found, k, 0, C, C + D, M, offs_m, NORM, FIXED_C, FIXED_M, BLOCK_C
        )
        if HAS_Y:
            acc = _source(
                acc, y, scale, shift, weight, row, found, k, C, D, C + D, M, offs_m, NORM, FIXED_D, FIXED_M, BLOCK_D
            )
    inside = n < X * Y * Z
    acc += tl.load(bias + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)[None, :]
    if FIXED_M > 0:
        to, valid = n.to(tl.int64) * FIXED_M, inside[:, None] & (offs_m < FIXED_M)[None, :]
    else:
        to, valid = tl.multiple_of(n.to(tl.int64) * M, 16), inside[:, None] & (offs_m >= 0)[None, :]
    place = to[:, None] + offs_m[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, acc, mask=valid)


@triton.jit(do_not_specialize=["V", "C"])
def _moments_kernel(
    x, mean, spread, V, C, SLICE: tl.constexpr, FIXED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One program: mean and sum of squared deviations of BLOCK_C channels over one slice."""
    s, start = tl.program_id(0), tl.program_id(1) * BLOCK_C
    count = tl.minimum(V - s * SLICE, SLICE)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in range(0, count, BLOCK_N):
        n = s * SLICE + first + tl.arange(0, BLOCK_N)
        b_x, _ = _load_rows(x, n.to(tl.int64), n < V, start, C, FIXED, BLOCK_C)
        total += tl.sum(b_x.to(tl.float32), axis=0)
    centre = total / count.to(tl.float32)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in range(0, count, BLOCK_N):
        n = s * SLICE + first + tl.arange(0, BLOCK_N)
        b_x, _ = _load_rows(x, n.to(tl.int64), n < V, start, C, FIXED, BLOCK_C)
        deviation = tl.where((n < V)[:, None], b_x.to(tl.float32) - centre[None, :], 0.0)
        squares += tl.sum(deviation * deviation, axis=0)
    c = start + tl.arange(0, BLOCK_C)
    tl.store(mean + s * C + c, centre, mask=c < C)
    tl.store(spread + s * C + c, squares, mask=c < C)


@triton.jit(do_not_specialize=["X", "Y", "Z"])
def _adaptive_kernel(x, weights, out, X, Y, Z, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_N voxels, each with 27 weights of its own, divided by the sum of their absolute values."""
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    inside = n < X * Y * Z
    acc, total = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32), tl.zeros([BLOCK_N], dtype=tl.float32)
    for k in range(27):
        row, found = _neighbor(n, k // 9 - 1, k // 3 % 3 - 1, k % 3 - 1, X, Y, Z)
        b_w = tl.load(weights + n.to(tl.int64) * 27 + k, mask=inside, other=0.0).to(tl.float32)
        b_x, _ = _load_rows(x, row, found, 0, C, C, BLOCK_C)
        total += tl.abs(b_w)
        acc += b_w[:, None] * b_x.to(tl.float32)
    acc = acc / tl.maximum(total, 1e-12)[:, None]
    tl.store(out + n.to(tl.int64)[:, None] * C + c[None, :], acc, mask=inside[:, None] & (c < C)[None, :])


def volume_conv_triton(
    x: Tensor,
    size: tuple[int, int, int],
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`volume_conv`, summed in float32: rows (V, C) and (V, D) -> (V, M)."""
    (V, C), M, D = x.shape, len(weight), 0 if y is None else y.shape[1]
    out = x.new_empty(V, M)
    rows = weight.permute(2, 3, 4, 1, 0).flatten(0, 2).contiguous()  # (K, C + D, M)
    bias = x.new_zeros(M) if bias is None else bias
    scale, shift = (bias, bias) if norm is None else norm
    second, added = (x if tensor is None else tensor.contiguous() for tensor in (y, residual))
    widest = max(_block(C), _block(D)) if D else _block(C)
    stages = abilities(x.device).stages(
        STAGES, (BLOCK_N + _block(M)) * widest * x.element_size(), BLOCK_N * 34 * x.element_size()
    )
    _conv_kernel[triton.cdiv(V, BLOCK_N), triton.cdiv(M, _block(M))](
        x.contiguous(), second, scale, shift, rows, bias, added, out, *size, C, D, M,
        EDGE=weight.shape[-1], NORM=norm is not None, HAS_Y=y is not None, HAS_RESIDUAL=residual is not None,
        FIXED_C=_fixed(C), FIXED_D=_fixed(D), FIXED_M=_fixed(M),
        BLOCK_N=BLOCK_N, BLOCK_C=_block(C), BLOCK_D=_block(D), BLOCK_M=_block(M), num_stages=stages,
    )  # fmt: skip
    return out


def channel_moments_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """`channel_moments` of rows (V, C), (C,) each: slices are summed in float32 and merged in float64."""
    V, C = x.shape
    slices, block = triton.cdiv(V, SLICE), _block(C)
    mean, spread = (torch.empty(slices, C, dtype=torch.float32, device=x.device) for _ in range(2))
    _moments_kernel[slices, triton.cdiv(C, block)](
        x.contiguous(), mean, spread, V, C, SLICE=SLICE, FIXED=_fixed(C), BLOCK_N=BLOCK_N, BLOCK_C=block
    )
    counts = torch.full((slices, 1), SLICE, dtype=torch.float64, device=x.device)
    counts[-1] = V - (slices - 1) * SLICE
    mean, spread = mean.double(), spread.double()
    total = (mean * counts).sum(0) / V
    return total, (spread + counts * (mean - total).square()).sum(0) / V


def adaptive_conv_triton(x: Tensor, size: tuple[int, int, int], weights: Tensor) -> Tensor:
    """`adaptive_conv` of rows (V, C), summed in float32: (V, C)."""
    V, C = x.shape
    out = torch.empty_like(x)
    arguments = x.contiguous(), weights.contiguous(), out, *size, C
    _adaptive_kernel[(triton.cdiv(V, BLOCK_N),)](*arguments, BLOCK_N=BLOCK_N, BLOCK_C=triton.next_power_of_2(C))
    return out


def _fixed(channels: int) -> int:
    """Return the number of channels to compile a kernel for, 0 for all multiples of 16."""
    return channels if channels % 16 else 0


def _block(channels: int) -> int:
    """Return the number of channels at a time. It divides a number that is a multiple of 16."""
    if channels % 16:
        return max(16, min(64, triton.next_power_of_2(channels)))
    return next(width for width in (64, 32, 16) if channels % width == 0)
