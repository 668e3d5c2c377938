"""Triton kernels of the submanifold convolution and of row permutations; definitions are in ../sparse_conv.py.

The 27 neighbours are gathered inside the matrix product, so no gathered copy is ever stored. torch's own gather takes
one thread block per row, which wastes most of it on the narrow rows (16-64 bytes) of the finest grids.

Sizes named in this file:
    N  voxels      K  offsets, 27      Cin, Cout  channels in and out      S  slices of the voxels
    M  rows of the result
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 128  # voxels at a time
MAX_BLOCK_C = 64  # channels at a time
SLICE = 16384  # voxels summed into one partial weight gradient


@triton.jit
def _conv_kernel(
    x, neighbors, weight, out, N, M,
    K: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the result and BLOCK_O output channels."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i, offs_o = tl.arange(0, BLOCK_I), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    valid, is_out = offs_n < M, offs_o < COUT
    acc = tl.zeros([BLOCK_N, BLOCK_O], dtype=tl.float32)
    for k in range(K):
        row = tl.load(neighbors + k * M + offs_n, mask=valid, other=N).to(tl.int64)
        found = row < N
        for first in range(0, CIN, BLOCK_I):
            is_in = first + offs_i < CIN
            b_x = tl.load(x + row[:, None] * CIN + first + offs_i, mask=found[:, None] & is_in, other=0.0)
            b_w = tl.load(
                weight + (k * CIN + first + offs_i)[:, None] * COUT + offs_o, mask=is_in[:, None] & is_out, other=0.0
            )
            acc += tl.dot(b_x, b_w, input_precision="ieee")  # [BLOCK_N, BLOCK_O]
    tl.store(out + offs_n[:, None] * COUT + offs_o, acc, mask=valid[:, None] & is_out)


@triton.jit
def _dweight_kernel(
    x, neighbors, dout, partial, N,
    K: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: the sum over one slice of voxels, for one offset and one tile of channels."""
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles_o: tl.constexpr = (COUT + BLOCK_O - 1) // BLOCK_O
    offs_i = tl.program_id(2) // tiles_o * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = tl.program_id(2) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_in, is_out = offs_i < CIN, offs_o < COUT
    acc = tl.zeros([BLOCK_I, BLOCK_O], dtype=tl.float32)
    for first in range(0, SLICE, BLOCK_N):
        offs_n = s * SLICE + first + tl.arange(0, BLOCK_N)
        valid = offs_n < N
        row = tl.load(neighbors + k * N + offs_n, mask=valid, other=N).to(tl.int64)
        b_x = tl.load(x + row[:, None] * CIN + offs_i, mask=(row < N)[:, None] & is_in, other=0.0)
        b_dout = tl.load(dout + offs_n[:, None] * COUT + offs_o, mask=valid[:, None] & is_out, other=0.0)
        acc += tl.dot(tl.trans(b_x), b_dout, input_precision="ieee")  # [BLOCK_I, BLOCK_O]
    to = ((s * K + k) * CIN + offs_i[:, None]) * COUT + offs_o
    tl.store(partial + to, acc, mask=is_in[:, None] & is_out)


@triton.jit
def _take_rows_kernel(x, order, out, SIZE, C: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK elements of the rows x[order], SIZE in all."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < SIZE
    row = tl.load(order + offs // C, mask=valid, other=0)
    tl.store(out + offs, tl.load(x + row * C + offs % C, mask=valid), mask=valid)


def _block(channels: int) -> int:
    return max(16, min(MAX_BLOCK_C, triton.next_power_of_2(channels)))


def gather_conv_triton(x: Tensor, neighbors: Tensor, weight: Tensor) -> Tensor:
    """out[m] = Σ_k x[neighbors[k, m]] @ weight[k]: x (N, Cin), neighbors (K, M), weight (K, Cin, Cout) -> (M, Cout).

    Sums in fp32, result in the dtype of x; a neighbour N is none.
    """
    N, M, (K, Cin, Cout) = len(x), neighbors.shape[1], weight.shape
    out = x.new_empty(M, Cout)
    if M:
        blocks = {"BLOCK_N": BLOCK_N, "BLOCK_I": _block(Cin), "BLOCK_O": _block(Cout)}
        grid = triton.cdiv(M, BLOCK_N), triton.cdiv(Cout, blocks["BLOCK_O"])
        arguments = x.contiguous(), neighbors.contiguous(), weight.contiguous(), out, N, M
        _conv_kernel[grid](*arguments, K=K, CIN=Cin, COUT=Cout, **blocks)
    return out


def gather_conv_dweight_triton(x: Tensor, neighbors: Tensor, dout: Tensor) -> Tensor:
    """Σ_n x[neighbors[k, n]]ᵀ dout[n]: x (N, Cin), neighbors (K, N), dout (N, Cout) -> (K, Cin, Cout) float32.

    Slices of the voxels are summed apart, then together, in a fixed order: deterministic.
    """
    (N, Cin), Cout, K = x.shape, dout.shape[1], len(neighbors)
    slices = triton.cdiv(N, SLICE)
    partial = torch.empty(slices, K, Cin, Cout, dtype=torch.float32, device=x.device)
    if N:
        blocks = {"BLOCK_N": BLOCK_N, "BLOCK_I": _block(Cin), "BLOCK_O": _block(Cout)}
        tiles = triton.cdiv(Cin, blocks["BLOCK_I"]) * triton.cdiv(Cout, blocks["BLOCK_O"])
        _dweight_kernel[(slices, K, tiles)](
            x.contiguous(), neighbors, dout.contiguous(), partial, N, K=K, CIN=Cin, COUT=Cout, SLICE=SLICE, **blocks
        )
    return partial.sum(0)


def take_rows_triton(x: Tensor, order: Tensor) -> Tensor:
    """x[order]: x (N, C), order (M,) long -> (M, C)."""
    out = x.new_empty(len(order), x.shape[1])
    if out.numel():
        BLOCK = 1024
        _take_rows_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            x.contiguous(), order, out, out.numel(), C=x.shape[1], BLOCK=BLOCK
        )
    return out
