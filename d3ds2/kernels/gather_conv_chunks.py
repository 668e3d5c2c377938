"""Submanifold convolution by torch alone: neighbours are gathered for some voxels at a time, then multiplied.

The definition is in gather_conv.py. A chunk and its row numbers take `gather_bytes`, whatever N is, or what MIN_ROWS
voxels need if that is more. Beside it lies one padded copy of the rows.

Sizes named in this file:
    N  voxels      M  voxels of a result      C  channels      Cin, Cout  channels in and out
    J  taps: the weights of one offset for one child
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .devices import on_cuda

CPU_GATHER_BYTES = 4 << 20  # a chunk stays in a core's cache
GATHER_BYTES = 64 << 20  # on a device; the estimates of memory count it
MIN_ROWS = 256
OFFSETS = 27
WORDS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}  # dtypes that copy so many bytes
MAX_WORDS = 16  # of a narrow row


def gather_bytes(device: torch.device) -> int:
    """Return the bytes for the neighbours that are gathered at a time."""
    return CPU_GATHER_BYTES if device.type == "cpu" else GATHER_BYTES


def gather_conv_chunks(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gather_conv` in chunks.

    The first children along an axis need only the first two thirds of the offsets along it, the second ones the last
    two. Offsets and children along x lie side by side in memory, so halves of the result are cheap to tell apart; then
    a third of the dense product, which would multiply by zero, is left out.
    """
    (_, Cin, channels), Cout = weight.shape, len(bias)
    out = x.new_empty(neighbors.shape[1], channels)
    bias = bias.repeat(channels // Cout)
    strided = x.device.type in ("cpu", "cuda")  # others do not write results with gaps between their rows as reliably
    parts = 2 if channels == 8 * Cout and strided else 1
    width, taps = channels // parts, OFFSETS // 3 * (4 - parts)  # channels of a part, and its offsets
    matrices = [weight[9 * i : 9 * i + taps, :, width * i : width * (i + 1)].flatten(0, 1) for i in range(parts)]
    for rows, columns in gathered(x, neighbors):
        for i, matrix in enumerate(matrices):
            to = slice(width * i, width * (i + 1))
            part = columns[:, 9 * i * Cin : (9 * i + taps) * Cin]
            torch.addmm(bias[to], part, matrix, out=out[rows, to])
    return out.view(-1, Cout)


def gradients_chunks(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    dout: Tensor,
    offset: Tensor,
    child: Tensor,
    children: int,
    with_dx: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x and of the weights of the taps, given dout, that of the result.

    One gathering serves both products: voxel m is read at offset k by its neighbour at the opposite offset.

    Args:
        x, neighbors: (N, Cin) and (27, N).
        weight: (J, Cin, Cout).
        dout: (children N, Cout).
        offset, child: of each tap, (J,) long.
        children: 1 or 8.
        with_dx: else the first result is None.
    """
    J, Cin, Cout = weight.shape
    matrix = weight.transpose(1, 2).reshape(J * Cout, Cin)
    dx = torch.empty_like(x) if with_dx else None
    dmatrix = matrix.new_zeros(matrix.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for rows, columns in gathered(dout, neighbors, 26 - offset, child, children):
        if dx is not None:
            torch.mm(columns, matrix, out=dx[rows])
        dmatrix += columns.t() @ x[rows]
    return dx, dmatrix.view(J, Cout, Cin).transpose(1, 2).to(weight.dtype)


def gathered(
    x: Tensor, neighbors: Tensor, offset: Tensor | None = None, child: Tensor | int = 0, children: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of voxels n: their slice, and x[children · neighbors[offset, n] + child], zero where there is none.

    The rows taken for a voxel lie side by side, (rows, J C). The next chunk overwrites them.
    """
    J, C = OFFSETS if offset is None else len(offset), x.shape[1]
    padded = torch.nn.functional.pad(x, (0, 0, 0, children))
    num_rows = max(MIN_ROWS, gather_bytes(x.device) // (J * (C * x.element_size() * 5 // 4 + 16)))
    M = neighbors.shape[1]
    buffer = x.new_empty(min(M, num_rows) * J, C)
    for first in range(0, M, num_rows):
        rows = slice(first, min(M, first + num_rows))
        index = neighbors[:, rows].t()  # (rows, 27)
        if offset is not None:
            index = index[:, offset] * children + child
        index = index.reshape(-1)
        yield rows, take_narrow_rows(padded, index, buffer[: len(index)]).view(-1, J * C)


def take_narrow_rows(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Write x[index] into `out` (M, C) and return it: x (N, C), index (M,), without a gradient.

    On a GPU, torch's gather takes a thread block for each row. Where rows are narrow, their words are gathered instead,
    as rows of one number, and a block takes many of them.
    """
    row_bytes = x.shape[1] * x.element_size()
    word = next((size for size in WORDS if row_bytes and row_bytes % size == 0), None)
    if not on_cuda(x) or word is None or row_bytes > MAX_WORDS * word:
        return torch.index_select(x, 0, index, out=out)
    return take_words(x, index, out, word)


def take_words(x: Tensor, index: Tensor, out: Tensor, word: int) -> Tensor:
    """`take_narrow_rows` in words of 2, 4, 8 or 16 bytes, which divide the rows."""
    count = x.shape[1] * x.element_size() // word
    words, to = (rows.view(WORDS[word]).view(-1) for rows in (x.contiguous(), out))
    if count > 1:
        places = torch.arange(count, dtype=index.dtype, device=index.device)
        index = torch.add(places, index[:, None], alpha=count).view(-1)
    torch.index_select(words, 0, index, out=to)
    return out
