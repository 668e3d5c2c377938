"""Submanifold convolution by spconv's implicit GEMM, for GPUs on which Triton does not run, such as those of Windows.

spconv numbers the 27 offsets as `Voxels.neighbors` does, so its tables follow from ours and no coordinates are needed.
The definition is in gather_conv.py. Tables are made for some voxels at a time, so that they stay small whatever N is.

Sizes named in this file:
    N  voxels      M  voxels of a result      Cin, Cout  channels in and out
"""

import logging
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .device_constant import device_constant
from .gather_conv_chunks import GATHER_BYTES, OFFSETS

CENTRE = 13  # the offset of the voxel itself
CHANNEL_MULTIPLE = 8  # which all of spconv's kernels take
TABLE_BYTES = 27 * 9 + 48  # for one voxel, while its tables are made
WORST_ERROR = 5e-3  # as a share of the largest result: in float16, spconv may sum in float16 (1.7e-3 on an H200)
MAX_BYTES = 2**31  # of the rows: spconv counts in int32


def spconv_runs(x: Tensor) -> bool:
    """Whether spconv convolves rows (N, Cin) like these; they lie on a GPU."""
    if torch.compiler.is_compiling() or x.dtype not in (torch.float16, torch.float32):
        return False
    return x.numel() * x.element_size() < MAX_BYTES and spconv_works(x.device, x.dtype)


@cache
def spconv_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether spconv convolves in this dtype on this device as the definition does, found by a small convolution.

    A build for the CPU, for another CUDA, or without kernels for this GPU does not; a warning says so once.
    """
    from .gather_conv import gather_conv_reference

    generator = torch.Generator().manual_seed(0)
    shapes = (200, 16), (OFFSETS, 16, 16), (16,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    neighbors = torch.randint(401, (OFFSETS, 200), generator=generator, dtype=torch.int32).clamp_(max=200)
    expected = gather_conv_reference(x.double(), neighbors, weight.double(), bias.double())
    try:
        with torch.no_grad():
            inputs = (part.to(device) for part in (x, neighbors, weight, bias))
            error = (gather_conv_spconv(*inputs).cpu() - expected).abs().max().item()
        limit = WORST_ERROR * expected.abs().max().item()
        problem = None if error < limit else f"it is off by {error:.3g} in a small convolution, more than {limit:.3g}"
    except Exception as exception:  # whatever an installation that does not fit this machine raises
        problem = f"{type(exception).__name__}: {exception}"
    if problem is not None:
        logging.warning(f"Direct3D-S2: spconv is installed, but not used for {dtype} on {device}: {problem}")
    return problem is None


def gather_conv_spconv(x: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gather_conv` of a float16 or float32 tensor on a GPU; sums in float32, or in float16 where spconv decides so.

    Args:
        x: (N, Cin).
        neighbors: (27, M) int32, N where there is none.
        weight: (27, Cin, channels).
        bias: (Cout,), repeated over the channels, or None.

    Returns:
        (M children, Cout), or (M, channels) without a bias.
    """
    (N, Cin), M, channels = x.shape, neighbors.shape[1], weight.shape[2]
    width = channels if bias is None else len(bias)
    more_in, more_out = -Cin % CHANNEL_MULTIPLE, -channels % CHANNEL_MULTIPLE
    filters = torch.nn.functional.pad(weight, (0, more_out, 0, more_in)).permute(2, 0, 1).contiguous()
    if bias is not None:
        bias = torch.nn.functional.pad(bias.repeat(channels // width), (0, more_out))
    x = torch.nn.functional.pad(x, (0, more_in)).contiguous()
    num_rows = GATHER_BYTES // TABLE_BYTES
    parts = [
        _implicit_gemm(x, *pair_tables(neighbors[:, first : first + num_rows], N), filters, bias)[:, :channels]
        for first in range(0, M, num_rows)
    ]
    out = x.new_empty(0, channels) if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(-1, width)


def pair_tables(neighbors: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make spconv's tables of the neighbours (27, M), `num_rows` where there is none.

    Returns:
        The neighbours, -1 where there is none, (27, M); a bit for each offset at which there is one, (M, 1), sorted;
        and the voxel of each of these, (M,). All int32. The bit of the centre is always set, because spconv writes no
        result for a group of voxels without any bit.
    """
    missing = neighbors >= num_rows
    pairs = neighbors.masked_fill(missing, -1)
    bits = device_constant(tuple(1 << k for k in range(OFFSETS)), neighbors.device)[:, None]
    mask = bits.masked_fill(missing, 0).sum(0, dtype=torch.int32).bitwise_or_(1 << CENTRE)
    mask, order = mask.sort()  # voxels with the same neighbours side by side: fewer products with missing ones
    return pairs, mask[:, None], order.int()


def _implicit_gemm(
    x: Tensor, pairs: Tensor, mask: Tensor, order: Tensor, filters: Tensor, bias: Tensor | None
) -> Tensor:
    """x (N, Cin) and filters (Cout, 27, Cin) -> (M, Cout), for the tables of `pair_tables`."""
    from spconv.pytorch import ops

    every_bit = np.array([0xFFFFFFFF], dtype=np.uint32)
    with torch.cuda.device(x.device):  # spconv asks torch for the current stream
        return ops.implicit_gemm(
            x, filters, pairs, [mask], [order], pairs.shape[1], [every_bit],
            is_train=False, is_subm=True, fp32_accum=True, bias=bias,
        )[0]  # fmt: skip
