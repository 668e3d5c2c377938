"""Submanifold convolution of rows and their known neighbours, and permutations of rows.

Once the 27 neighbours of each voxel are gathered, a convolution is one matrix product. On CUDA the kernels of
gather_conv_triton.py gather inside the product. Where Triton does not run, so does spconv, if it is installed: see
gather_conv_spconv.py. Elsewhere gather_conv_chunks.py gathers some rows at a time.

Sizes named in this file:
    N  voxels      M  rows of a result      C  channels      Cin, Cout  channels in and out
    J  taps: the weights of one offset for one child; 27 in a plain convolution, 8 for each of 8 children
"""

from itertools import product

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .device_constant import device_constant
from .devices import on_spconv, on_triton, triton_works
from .gather_conv_chunks import gather_bytes, gather_conv_chunks, gradients_chunks, take_narrow_rows


def submanifold_conv(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor, children: int = 1) -> Tensor:
    """`out[children n + c] = bias + Σ_j x[neighbors[offset_j, n]] @ weight[j]` over the taps j of child c.

    Differentiable in x, weight and bias.

    Args:
        x: (N, Cin).
        neighbors: (27, N) rows of x around each voxel, N where there is none.
        weight: (27, Cin, Cout), or for 8 children (64, Cin, Cout), as `children_weight` makes it.
        bias: (Cout,).
        children: 1 or 8 rows of the result for each voxel.

    Returns:
        (children N, Cout).
    """
    return _SubmanifoldConv.apply(x, neighbors, weight, bias, children)


def gather_conv(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the same convolution with dense weights, for some rows of the result and without a gradient.

    Args:
        x: (N, Cin).
        neighbors: (27, M) rows of x around each of M voxels, N where there is none.
        weight: (27, Cin, children · Cout), as `dense_weight` makes it.
        bias: (Cout,).

    Returns:
        (M · children, Cout), child c of voxel m in row children · m + c.
    """
    if on_triton(x):
        from .gather_conv_triton import gather_conv_triton

        return gather_conv_triton(x, neighbors, weight, bias).view(-1, len(bias))
    if _on_spconv(x):
        from .gather_conv_spconv import gather_conv_spconv

        return gather_conv_spconv(x, neighbors, weight, bias)
    return gather_conv_chunks(x, neighbors, weight, bias)


def workspace_bytes(device: torch.device) -> int:
    """Count the bytes that a convolution takes beside its rows and one copy of them, whatever their number."""
    return 0 if triton_works(device) else gather_bytes(device)


def gather_conv_reference(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Definition of `gather_conv`."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    out = bias.repeat(weight.shape[2] // len(bias))
    for rows, matrix in zip(neighbors, weight, strict=True):
        out = out + padded.index_select(0, rows) @ matrix
    return out.view(-1, len(bias))


def gather_conv_gradients_chunks(
    x: Tensor, neighbors: Tensor, weight: Tensor, dout: Tensor, children: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias by torch alone; arguments as `submanifold_conv`.

    dout (children N, Cout) is the gradient of the result.
    """
    dx, dweight = gradients_chunks(x, neighbors, weight, dout, *_taps(children, x.device), children)
    return dx, dweight, dout.sum(0)


def gather_conv_gradients_spconv(
    x: Tensor, neighbors: Tensor, weight: Tensor, dout: Tensor, children: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`gather_conv_gradients_chunks`, but the gradient of x by spconv."""
    from .gather_conv_spconv import gather_conv_spconv

    # voxel m is read at offset k by its neighbour at the opposite offset
    transposed = dense_weight(weight, children).flip(0).transpose(1, 2)
    dx = gather_conv_spconv(dout.reshape(len(x), -1), neighbors, transposed)
    _, dweight = gradients_chunks(x, neighbors, weight, dout, *_taps(children, x.device), children, with_dx=False)
    return dx, dweight, dout.sum(0)


def gather_conv_gradients_triton(
    x: Tensor, neighbors: Tensor, weight: Tensor, dout: Tensor, children: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`gather_conv_gradients_chunks` by the Triton kernels."""
    from .gather_conv_triton import gather_convs, gather_convs_gradients

    rows = dout.reshape(1, len(x), -1)  # (1, N, children Cout)
    dx = gather_convs(rows, neighbors, dense_weight(weight, children)[None], transposed=True)[0]
    dtype = weight.dtype if children == 1 else torch.float32
    (dweight,), (dbias,) = gather_convs_gradients(x[None], neighbors, rows, dtype)  # (27, Cin, children Cout)
    if children > 1:
        dweight = dweight.unflatten(2, (children, -1)).transpose(1, 2)[_taps(children, x.device)]
        dbias = dbias.unflatten(0, (children, -1)).sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


class _SubmanifoldConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, neighbors, weight, bias, children):
        ctx.save_for_backward(x, neighbors, weight)
        ctx.children = children
        return gather_conv(x, neighbors, dense_weight(weight, children), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, neighbors, weight = ctx.saved_tensors
        if on_triton(x):
            gradients = gather_conv_gradients_triton
        else:
            gradients = gather_conv_gradients_spconv if _on_spconv(x) else gather_conv_gradients_chunks
        dx, dweight, dbias = gradients(x, neighbors, weight, dout, ctx.children)
        return dx, None, dweight, dbias, None


def _on_spconv(x: Tensor) -> bool:
    if not on_spconv(x):
        return False
    from .gather_conv_spconv import spconv_runs

    return spconv_runs(x)


def dense_weight(weight: Tensor, children: int) -> Tensor:
    """Weights of the taps (J, Cin, Cout) -> (27, Cin, children · Cout), zero where a child has no tap."""
    if children == 1:
        return weight
    offset, child = _taps(children, weight.device)
    dense = weight.new_zeros(27, children, *weight.shape[1:])
    dense[offset, child] = weight
    return dense.transpose(1, 2).flatten(2)


def children_weight(weight: Tensor) -> Tensor:
    """Weights (27, Cin, Cout) on the subdivided grid -> those of the taps on the coarse one, (64, Cin, Cout).

    Per axis, child 0 finds its fine offsets (-1, 0, 1) at the coarse offsets (-1, 0, 0), child 1 at (0, 0, 1).
    """
    return _ChildrenWeight.apply(weight)


class _ChildrenWeight(torch.autograd.Function):
    """Along an axis, child 0 has the taps before and centre + after, child 1 before + centre and after."""

    @staticmethod
    def forward(ctx, weight):
        first, second = (device_constant(rows, weight.device) for rows in ((0, 1, 0, 2), (2, 1)))
        ctx.shape = weight.shape
        weight = weight.unflatten(0, (3, 3, 3))  # (x, y, z, Cin, Cout)
        for axis in (2, 1, 0):
            taps = weight.index_select(axis, first)
            taps.narrow(axis, 1, 2).add_(weight.index_select(axis, second))
            weight = taps
        channels = weight.shape[3:]
        return weight.view(2, 2, 2, 2, 2, 2, *channels).permute(0, 2, 4, 1, 3, 5, 6, 7).reshape(64, *channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtaps):
        first, second = (device_constant(rows, dtaps.device) for rows in ((0, 1, 1), (2, 2, 3)))
        dtaps = dtaps.unflatten(0, (2, 2, 2, 2, 2, 2)).permute(0, 3, 1, 4, 2, 5, 6, 7)
        dtaps = dtaps.reshape(4, 4, 4, *ctx.shape[1:])
        for axis in (0, 1, 2):
            dtaps = dtaps.index_select(axis, first).add_(dtaps.index_select(axis, second))
        return dtaps.flatten(0, 2)


def _taps(children: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coarse offset and child of each tap, (J,) long each: 27 of a single child, or 8 for each of 8 children."""
    offset, child = CHILDREN_TAPS if children == 8 else (tuple(range(27)), (0,) * 27)
    return device_constant(offset, device, torch.long), device_constant(child, device, torch.long)


def _children_taps() -> tuple[tuple, tuple]:
    pairs = list(product(product((0, 1), repeat=3), repeat=2))  # child and tap, per axis: together 0, 1, 2 are -1, 0, 1
    offset = tuple(sum(9 // 3**i * (c + t) for i, (c, t) in enumerate(zip(*pair, strict=True))) for pair in pairs)
    return offset, tuple(4 * i + 2 * j + k for (i, j, k), _ in pairs)


CHILDREN_TAPS = _children_taps()  # (64,) each


def permute_rows(x: Tensor, order: Tensor) -> Tensor:
    """x[order] for a permutation: x (N, C), order (N,) long. Its gradient is the inverse permutation, not a sum."""
    return _PermuteRows.apply(x, order)


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """x[order] without a gradient: x (N, C), order (M,) long -> (M, C)."""
    if on_triton(x):
        from .gather_conv_triton import take_rows_triton

        return take_rows_triton(x, order)
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return x.index_select(0, order)
    return take_narrow_rows(x, order, x.new_empty(len(order), x.shape[1]))


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return take_rows(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (order,) = ctx.saved_tensors
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return take_rows(dout, inverse), None
