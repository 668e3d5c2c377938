"""Compression of keys and values together (eq. 7): the public operations and their definitions in torch.

Sizes named in this file:
    T  tensors: keys and values      N  tokens      C  channels of the keys and of the values, Hk D
    Nc  cells                        c  edge of a cell, in voxels
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
        coords: of the cells, (Nc, 4) int32 [batch, x, y, z].
        neighbors: of the cells, (27, Nc) int32.
        places, place: tokens at each of the c³ places in a cell, and the place of each token, (N,) long.
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
    """Return whether the kernels compress keys and values of this kind together, in few launches."""
    return half_on_triton(k) and len(k) > 0


def pooled_silu(x: Tensor, cells: Cells) -> Tensor:
    """Return the pooled SiLU of x (T, N, C), N > 0: (T, Nc, C), dtype of x. Differentiable in x."""
    if not half_on_triton(x):
        return pooled_silu_reference(x, cells)
    if torch.compiler.is_compiling():
        from .uncompiled import pooled_silu_triton
    else:
        from .compression_triton import pooled_silu_triton
    return pooled_silu_triton(x, cells)


def pooled_silu_reference(x: Tensor, cells: Cells) -> Tensor:
    """Definition of `pooled_silu`."""
    return torch.stack([_pool(torch.nn.functional.silu(rows), cells) for rows in x])


def pooled_conv_compression(
    k: Tensor, v: Tensor, position: Tensor, parameters: list[Tensor], cells: Cells, num_groups: int, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm, pool and convolve k + position[place] and v, around a pooled skip.

    Args:
        k, v: (N, C), N > 0.
        position: (c³, C).
        parameters: for keys and values in turn: weight and bias of the first norm and of the second, biases of the
            first and of the second convolution, (C,) each; then their weights (27, C, C).
        cells: the rows of each cell and the neighbours of the cells.
        num_groups, eps: of the norms.
        dtype: of the convolutions and of the results.

    Returns:
        Two (Nc, C). Differentiable in k, v, position and the parameters.
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
    """Definition of `pooled_conv_compression`."""
    outputs = []
    for x, (w_in, b_in, w_out, b_out, bias_in, bias_out, conv_in, conv_out) in (
        (k + position[cells.place], parameters[0::2]),
        (v, parameters[1::2]),
    ):
        conv_in, bias_in, conv_out, bias_out = (part.to(dtype) for part in (conv_in, bias_in, conv_out, bias_out))
        activated = packed_group_norm_reference(x, w_in, b_in, cells.samples, num_groups, eps, silu=True)
        hidden = submanifold_conv(_pool(activated, cells).to(dtype), cells.neighbors, conv_in, bias_in)
        hidden = packed_group_norm_reference(hidden, w_out, b_out, cells.coarse_samples, num_groups, eps, silu=True)
        outputs.append(submanifold_conv(hidden, cells.neighbors, conv_out, bias_out) + _pool(x, cells).to(dtype))
    return outputs[0], outputs[1]


def _pool(x: Tensor, cells: Cells) -> Tensor:
    """The sum of the rows of each cell over their number + 1: (N, C) -> (Nc, C), as the released models divide."""
    counts = cells.tokens.offsets.diff()[:, None]
    return (segment_sum_reference(x, cells.tokens, cells.parent) / (counts + 1)).to(x.dtype)
