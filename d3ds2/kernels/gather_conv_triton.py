"""Triton kernels of the submanifold convolution and of row permutations; the definitions are in gather_conv.py.

The convolution gathers the 27 neighbours inside the matrix product, so no gathered copy is stored. One launch serves
several convolutions over the same neighbours.

Rows have their own kernel because torch's gather takes one thread block per row, and the rows of the finest grids are
narrow (16-64 bytes): most of the block would idle.

Sizes named in this file:
    N  voxels      K  offsets, 27      Cin, Cout  channels in and out      S  slices of the voxels
    M  rows of the result      G  convolutions
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import abilities

BLOCK_N = 128  # voxels at a time
MIN_BLOCK_N = 16  # voxels at a time in a small result, so that it keeps a whole GPU busy
MAX_BLOCK_C = 64  # channels at a time
SLICE, MIN_SLICE = 16384, 128  # most and least voxels summed into one partial weight gradient
CONV_PROGRAMS, DWEIGHT_PROGRAMS = 2, 8  # programs of a multiprocessor that a launch aims at
STAGES, DEEP_STAGES = 3, 5  # stages of the pipeline; with few rows at a time, programs mostly wait for gathered rows
BLOCK_S, SUMMED = 8, 512  # slices, and numbers of each, summed at a time


@triton.jit(do_not_specialize=["N", "M"])
def _conv_kernel(
    x, neighbors, weight, bias, added, out, N, M,
    K: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr, CB: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the result and BLOCK_O output channels of one convolution.

    The bias has CB channels and is repeated. TRANSPOSED is the gradient: weight (G, K, Cout, Cin), offsets reversed.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i, offs_o = tl.arange(0, BLOCK_I), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    conv = tl.program_id(2).to(tl.int64)
    valid, is_out = offs_n < M, offs_o < COUT
    x += conv * N * CIN
    weight += conv * K * CIN * COUT
    acc = tl.zeros([BLOCK_N, BLOCK_O], dtype=tl.float32)
    for k in range(K):
        row = tl.load(neighbors + k * M + offs_n, mask=valid, other=0).to(tl.int64)  # Triton 3.1 rejects an other of N
        found = valid & (row < N)
        for first in range(0, CIN, BLOCK_I):
            is_in = first + offs_i < CIN
            b_x = tl.load(x + row[:, None] * CIN + first + offs_i, mask=found[:, None] & is_in, other=0.0)
            if TRANSPOSED:
                at = ((K - 1 - k) * COUT + offs_o)[None, :] * CIN + (first + offs_i)[:, None]
            else:
                at = (k * CIN + first + offs_i)[:, None] * COUT + offs_o
            b_w = tl.load(weight + at, mask=is_in[:, None] & is_out, other=0.0)
            acc += tl.dot(b_x, b_w, input_precision="ieee")  # [BLOCK_N, BLOCK_O]
    to = (conv * M + offs_n[:, None]) * COUT + offs_o
    mask = valid[:, None] & is_out
    if HAS_BIAS:
        acc += tl.load(bias + conv * CB + offs_o % CB, mask=is_out, other=0.0).to(tl.float32)
    if HAS_ADDED:
        acc += tl.load(added + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _dweight_kernel(
    x, neighbors, dout, partial, N, SLICE,
    K: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: the sum over one slice of voxels, for one offset and one tile of channels of one convolution.

    The gradient of the bias follows those of the offsets: partial is (S, G, K CIN + 1, COUT).
    """
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1) % (K + 1)
    conv, convs = (tl.program_id(1) // (K + 1)).to(tl.int64), tl.num_programs(1) // (K + 1)
    tiles_o: tl.constexpr = (COUT + BLOCK_O - 1) // BLOCK_O
    offs_i = tl.program_id(2) // tiles_o * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = tl.program_id(2) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_in, is_out = offs_i < CIN, offs_o < COUT
    x += conv * N * CIN
    dout += conv * N * COUT
    partial += (s * convs + conv) * (K * CIN + 1) * COUT
    begin = s * SLICE
    end = tl.minimum(begin + SLICE, N)
    if k < K:
        acc = tl.zeros([BLOCK_I, BLOCK_O], dtype=tl.float32)
        for first in range(begin, end, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            valid = offs_n < end
            row = tl.load(neighbors + k.to(tl.int64) * N + offs_n, mask=valid, other=0).to(tl.int64)
            found = valid & (row < N)
            b_x = tl.load(x + row[:, None] * CIN + offs_i, mask=found[:, None] & is_in, other=0.0)
            b_dout = tl.load(dout + offs_n[:, None] * COUT + offs_o, mask=valid[:, None] & is_out, other=0.0)
            acc += tl.dot(tl.trans(b_x), b_dout, input_precision="ieee")  # [BLOCK_I, BLOCK_O]
        tl.store(partial + (k * CIN + offs_i[:, None]) * COUT + offs_o, acc, mask=is_in[:, None] & is_out)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_O], dtype=tl.float32)
        for first in range(begin, end, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            mask = (offs_n < end)[:, None] & is_out
            total += tl.load(dout + offs_n[:, None] * COUT + offs_o, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial + K * CIN * COUT + offs_o, tl.sum(total, 0), mask=is_out)


@triton.jit(do_not_specialize=["S"])
def _sum_slices_kernel(partial, out, S, SIZE, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of out (SIZE,), the sum of partial (S, SIZE)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK_S, BLOCK], dtype=tl.float32)
    for first in range(0, S, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        acc += tl.load(partial + s[:, None] * SIZE + offs, mask=(s < S)[:, None] & (offs < SIZE), other=0.0)
    tl.store(out + offs, tl.sum(acc, 0).to(out.dtype.element_ty), mask=offs < SIZE)


@triton.jit(do_not_specialize=["M"])
def _take_rows_kernel(x, order, out, M, C: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK elements of the M rows x[order]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = offs // C
    valid = place < M  # so the compiler knows that C neighbours agree: it loads and stores them together
    row = tl.load(order + place, mask=valid, other=0)
    tl.store(out + offs, tl.load(x + row * C + offs % C, mask=valid), mask=valid)


def _block(channels: int) -> int:
    return max(16, min(MAX_BLOCK_C, triton.next_power_of_2(channels)))


def gather_convs(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """out[g, m] = bias[g] + added[g, m] + Σ_k x[g, neighbors[k, m]] @ weight[g, k]; sums in fp32, result as x.

    Args:
        x: (G, N, Cin).
        neighbors: (K, M) int32, N where there is none.
        weight: (G, K, Cin, Cout); with `transposed` (G, K, Cout, Cin), and weight[g, K - 1 - k]ᵀ is multiplied.
        bias: (G, channels), repeated over Cout.
        added: (G, M, Cout).

    Returns:
        (G, M, Cout), dtype of x.
    """
    (G, N, Cin), (K, M) = x.shape, neighbors.shape
    Cout = weight.shape[2 if transposed else 3]
    out = x.new_empty(G, M, Cout)
    if M:
        blocks = {"BLOCK_I": _block(Cin), "BLOCK_O": _block(Cout)}
        columns = triton.cdiv(Cout, blocks["BLOCK_O"])
        card = abilities(x.device)
        rows = triton.next_power_of_2(triton.cdiv(M * columns * G, CONV_PROGRAMS * card.multiprocessors))
        rows = max(MIN_BLOCK_N, min(BLOCK_N, rows))
        stages = card.stages(
            DEEP_STAGES if rows <= 32 else STAGES,
            (rows + blocks["BLOCK_O"]) * blocks["BLOCK_I"] * x.element_size(),
        )
        _conv_kernel[triton.cdiv(M, rows), columns, G](
            x.contiguous(), neighbors.contiguous(), weight.contiguous(),
            out if bias is None else bias, out if added is None else added, out, N, M,
            K=K, CIN=Cin, COUT=Cout, CB=Cout if bias is None else bias.shape[1], HAS_BIAS=bias is not None,
            HAS_ADDED=added is not None, TRANSPOSED=transposed, BLOCK_N=rows, **blocks,
            num_stages=stages,
        )  # fmt: skip
    return out


def gather_conv_triton(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gather_convs` for one convolution, without the leading G: x (N, Cin) -> (M, Cout)."""
    return gather_convs(x[None], neighbors, weight[None], None if bias is None else bias[None])[0]


def gather_convs_gradients(x: Tensor, neighbors: Tensor, dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute Σ_n x[g, neighbors[k, n]]ᵀ dout[g, n] and Σ_n dout[g, n], the gradients of weight and bias.

    The kernels sum each slice of the voxels and then add up these sums, in a fixed order: the result is deterministic.

    Args:
        x, dout: (G, N, Cin) and (G, N, Cout).
        neighbors: (K, N) int32, N where there is none.
        dtype: dtype of the results; the kernels sum in fp32.

    Returns:
        Gradients of weight (G, K, Cin, Cout) and bias (G, Cout).
    """
    (G, N, Cin), Cout, K = x.shape, dout.shape[2], len(neighbors)
    blocks = {"BLOCK_I": _block(Cin), "BLOCK_O": _block(Cout)}
    tiles = triton.cdiv(Cin, blocks["BLOCK_I"]) * triton.cdiv(Cout, blocks["BLOCK_O"])
    card = abilities(x.device)
    size = triton.next_power_of_2(triton.cdiv(N * tiles * G * K, DWEIGHT_PROGRAMS * card.multiprocessors))
    size = max(MIN_SLICE, min(SLICE, size))
    S = triton.cdiv(N, size)
    out = torch.empty(G, K * Cin + 1, Cout, dtype=dtype, device=x.device)
    partial = torch.empty(S, *out.shape, dtype=torch.float32, device=x.device)
    if N:
        _dweight_kernel[S, G * (K + 1), tiles](
            x.contiguous(), neighbors.contiguous(), dout.contiguous(), partial, N, size,
            K=K, CIN=Cin, COUT=Cout, BLOCK_N=BLOCK_N, **blocks,
            num_stages=card.stages(STAGES, (blocks["BLOCK_I"] + blocks["BLOCK_O"]) * BLOCK_N * x.element_size()),
        )  # fmt: skip
    if out.numel():
        _sum_slices_kernel[(triton.cdiv(out.numel(), SUMMED),)](
            partial, out, S, out.numel(), BLOCK_S=BLOCK_S, BLOCK=SUMMED
        )
    return out[:, :-1].unflatten(1, (K, Cin)), out[:, -1]


def take_rows_triton(x: Tensor, order: Tensor) -> Tensor:
    """Return x[order]: x (N, C), order (M,) long -> (M, C)."""
    out = x.new_empty(len(order), x.shape[1])
    if out.numel():
        BLOCK = 1024
        _take_rows_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            x.contiguous(), order, out, len(order), C=x.shape[1], BLOCK=BLOCK
        )
    return out
