"""Compression of keys and values together (eq. 7): the public operations, and their definitions in torch.

A cell is a cube of c³ voxels, whose tokens are compressed into one.

Sizes named in this file:
    T  tensors: keys and values      N   tokens      C  channels of the keys and of the values, Hk D
    c  edge of a cell, in voxels     Nc  cells
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .devices import half_on_triton
from .gather_conv import submanifold_conv
from .group_norm import packed_group_norm_reference
from .ragged import Ragged
from .segment_sum import segment_sum_reference


@dataclass(frozen=True, eq=False)
class Cells:
    """The rows that compression pools and convolves.

    Args:
        samples, coarse_samples: tokens and cells of each sample.
        tokens: tokens of each cell.
        parent: cell of each token, (N,) long.
        coords: coordinates of the cells, (Nc, 4) int32 [batch, x, y, z].
        neighbors: neighbours of the cells, (27, Nc) int32, Nc where there is none.
        places: tokens at each of the c³ places in a cell.
        place: place of each token in its cell, (N,) long.
    """

    samples: Ragged
    coarse_samples: Ragged
    tokens: Ragged
    parent: Tensor
    coords: Tensor
    neighbors: Tensor
    places: Ragged
    place: Tensor


def compresses_together(k: Tensor) -> bool:
    """Return whether the kernels compress keys such as k (N, C) together with their values, in few launches."""
    return half_on_triton(k) and len(k) > 0


def pooled_silu(x: Tensor, cells: Cells) -> Tensor:
    """Pool SiLU(x) of x (T, N, C), N > 0, over cells: (T, Nc, C), dtype of x. Differentiable in x."""
    if not half_on_triton(x):
        return pooled_silu_reference(x, cells)
    if torch.compiler.is_compiling():
        from .uncompiled import pooled_silu_triton
    else:
        from .compression_triton import pooled_silu_triton
    return pooled_silu_triton(x, cells)


def pooled_silu_reference(x: Tensor, cells: Cells) -> Tensor:
    """Definition of `pooled_silu`: x (T, N, C) -> (T, Nc, C)."""
    return torch.stack([_pool(torch.nn.functional.silu(rows), cells) for rows in x])


def pooled_conv_compression(
    k: Tensor, v: Tensor, position: Tensor, parameters: list[Tensor], cells: Cells, num_groups: int, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm, pool and convolve k + position[place] and v, and add the pooled input.

    Args:
        k, v: keys and values (N, C), N > 0.
        position: embedding of each place in a cell, (c³, C).
        parameters: 16 tensors, each one of the keys followed by the same of the values: weight and bias of the first
            norm, weight and bias of the second norm, biases of the two convolutions, (C,) each, and weights of the two
            convolutions (27, C, C).
        cells: the rows of each cell and the neighbours of the cells.
        num_groups, eps: groups of channels in the norms, and the number added to their variances.
        dtype: dtype of the convolutions and of the results.

    Returns:
        Compressed keys and values, (Nc, C) each. Differentiable in k, v, position and the parameters.
    """
    inputs = k, v, position, parameters, cells, num_groups, eps, dtype
    if not half_on_triton(k):
        return pooled_conv_compression_reference(*inputs)
    if torch.compiler.is_compiling():
        from .uncompiled import pooled_conv_compression_triton
    else:
        from .compression_triton import pooled_conv_compression_triton
    return pooled_conv_compression_triton(*inputs)


def pooled_conv_compression_reference(
    k: Tensor, v: Tensor, position: Tensor, parameters: list[Tensor], cells: Cells, num_groups: int, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Definition of `pooled_conv_compression`: k and v (N, C) -> (Nc, C) each."""
    outputs, of_keys, of_values = [], parameters[0::2], parameters[1::2]
    for x, own_parameters in ((k + position[cells.place], of_keys), (v, of_values)):
        w_in, b_in, w_out, b_out, *convolutions = own_parameters
        bias_in, bias_out, conv_in, conv_out = (parameter.to(dtype) for parameter in convolutions)
        activated = packed_group_norm_reference(x, w_in, b_in, cells.samples, num_groups, eps, silu=True)
        hidden = submanifold_conv(_pool(activated, cells).to(dtype), cells.neighbors, conv_in, bias_in)
        hidden = packed_group_norm_reference(hidden, w_out, b_out, cells.coarse_samples, num_groups, eps, silu=True)
        outputs.append(submanifold_conv(hidden, cells.neighbors, conv_out, bias_out) + _pool(x, cells).to(dtype))
    return outputs[0], outputs[1]


def _pool(x: Tensor, cells: Cells) -> Tensor:
    """Divide the sum of the rows of a cell by their number + 1, as the released models do: (N, C) -> (Nc, C)."""
    counts = cells.tokens.offsets.diff()[:, None]
    return (segment_sum_reference(x, cells.tokens, cells.parent) / (counts + 1)).to(x.dtype)
