"""Compression of keys and values together, in Triton; the definitions are in compression.py.

One launch serves both tensors. Between operations of one launch numbers stay fp32, where the definition rounds them.

Sizes named in this file:
    T  tensors: keys and values      N   tokens      C  channels of the keys and of the values, Hk D
    B  samples                       Nc  cells       G  groups of channels
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compression import Cells
from .gather_conv_triton import gather_convs, gather_convs_gradients
from .group_norm_triton import Pooled, group_norm_apply, group_norm_backward, group_norm_statistics, silu_gradient
from .segment_sum_triton import segment_sum_triton

MAX_BLOCK_N, MAX_BLOCK_C = 64, 64  # rows and channels at a time


@triton.jit(do_not_specialize=["B", "N"])
def _pool_kernel(
    x, statistics, weight, bias, coords, offsets, ids, pooled, skip, B, N,
    C: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_IDS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program: pool SiLU(x) in BLOCK_C channels of one cell, as sum / (count + 1).

    With NORM, pool SiLU(norm(x)) instead, and x itself into `skip`.
    """
    cell, tensor = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_c = offs_c < C
    begin, end = tl.load(offsets + cell), tl.load(offsets + cell + 1)
    if NORM:
        group = statistics + (tensor * B + tl.load(coords + cell * 4)) * G + offs_c // (C // G)
        mean = tl.load(group, mask=is_c, other=0.0)
        rstd = tl.load(group + tl.num_programs(2) * B * G, mask=is_c, other=0.0)
        scale = tl.load(weight + tensor * C + offs_c, mask=is_c, other=0.0).to(tl.float32) * rstd
        shift = tl.load(bias + tensor * C + offs_c, mask=is_c, other=0.0).to(tl.float32)
    sum_activated = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    sum_x = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        valid = at < end
        row = at.to(tl.int64)
        if HAS_IDS:
            row = tl.load(ids + at, mask=valid, other=0).to(tl.int64)
        mask = valid[:, None] & is_c
        b_x = tl.load(x + (tensor * N + row)[:, None] * C + offs_c, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            sum_x += b_x
            b_x = (b_x - mean) * scale + shift
        sum_activated += tl.where(mask, b_x * tl.sigmoid(b_x), 0.0)
    count = (end - begin + 1).to(tl.float32)
    to = (tensor * tl.num_programs(0) + cell) * C + offs_c
    tl.store(pooled + to, (tl.sum(sum_activated, 0) / count).to(pooled.dtype.element_ty), mask=is_c)
    if NORM:
        tl.store(skip + to, tl.sum(sum_x, 0) / count, mask=is_c)


@triton.jit(do_not_specialize=["N", "M"])
def _pool_gradient_kernel(
    x, parent, offsets, dpooled, dx, N, M,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_N rows and BLOCK_C channels of x, from that of SiLU(x) pooled in M cells."""
    tensor = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = row < N
    mask = valid[:, None] & (offs_c < C)
    cell = tl.load(parent + row, mask=valid, other=0)
    count = tl.load(offsets + cell + 1, mask=valid, other=0) - tl.load(offsets + cell, mask=valid, other=0)
    share = 1 / (count + 1).to(tl.float32)
    b_d = tl.load(dpooled + (tensor * M + cell)[:, None] * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    at = (tensor * N + row)[:, None] * C + offs_c
    b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b_dx = b_d * share[:, None] * silu_gradient(b_x)
    tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=mask)


def _pool(x: Tensor, cells: Cells, pooled: Tensor, norm: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor | None:
    """Pool SiLU(x) of x (T, N, C) into `pooled` (T, Nc, C).

    With `norm` = statistics, weight and bias, pool SiLU(norm(x)) instead, and return x itself pooled, (T, Nc, C)
    float32.
    """
    (T, N, C), Nc, tokens = x.shape, pooled.shape[1], cells.tokens
    skip = None if norm is None else torch.empty(T, Nc, C, dtype=torch.float32, device=x.device)
    statistics, weight, bias = norm or (x, x, x)
    BLOCK_C = min(MAX_BLOCK_C, triton.next_power_of_2(C))
    BLOCK_N = min(MAX_BLOCK_N, triton.next_power_of_2(triton.cdiv(tokens.longest, 2)))
    ids = tokens.offsets if tokens.ids is None else tokens.ids
    _pool_kernel[Nc, triton.cdiv(C, BLOCK_C), T](
        x, statistics, weight, bias, cells.coords, tokens.offsets, ids, pooled, pooled if skip is None else skip,
        len(cells.samples), N,
        C=C, G=1 if norm is None else statistics.shape[3], BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C,
        HAS_IDS=tokens.ids is not None, NORM=norm is not None,
    )  # fmt: skip
    return skip


class _PooledSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cells):
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.cells = cells
        pooled = x.new_empty(len(x), len(cells.tokens), x.shape[2])
        _pool(x, cells, pooled)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, dpooled):
        (x,) = ctx.saved_tensors
        (T, N, C), cells, dx = x.shape, ctx.cells, torch.empty_like(x)
        BLOCK_C = min(MAX_BLOCK_C, triton.next_power_of_2(C))
        _pool_gradient_kernel[triton.cdiv(N, MAX_BLOCK_N), triton.cdiv(C, BLOCK_C), T](
            x, cells.parent, cells.tokens.offsets, dpooled.contiguous(), dx, N, dpooled.shape[1],
            C=C, BLOCK_N=MAX_BLOCK_N, BLOCK_C=BLOCK_C,
        )  # fmt: skip
        return dx, None


def pooled_silu_triton(x: Tensor, cells: Cells) -> Tensor:
    """`pooled_silu`: x (T, N, C) -> (T, Nc, C)."""
    return _PooledSiLU.apply(x, cells)


class _PooledConvCompression(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, position, cells, num_groups, eps, dtype, *parameters):
        (N, C), Nc = k.shape, len(cells.coords)
        *first_vectors, keys_in, values_in, keys_out, values_out = parameters
        vectors = torch.stack(first_vectors).view(6, 2, C)
        weights = torch.stack((keys_in, values_in, keys_out, values_out)).to(dtype)  # (4, 27, C, C)
        scale_in, shift_in, scale_out, shift_out, bias_in, bias_out = vectors  # of norms and convolutions, (2, C) each
        conv_in, conv_out = weights.split(2)  # (2, 27, C, C) each
        x = k.new_empty(2, N, C, dtype=torch.promote_types(k.dtype, position.dtype))
        features = k.new_empty(4, Nc, C, dtype=dtype)
        features_in, features_out = features.split(2)  # the inputs of the convolutions, (2, Nc, C) each
        joined = k.contiguous(), v.contiguous(), position.contiguous(), cells.place
        statistics_in = group_norm_statistics(x, cells.samples, num_groups, eps, joined)
        skip = _pool(x, cells, features_in, (statistics_in, scale_in, shift_in))
        hidden = gather_convs(features_in, cells.neighbors, conv_in, bias_in)
        statistics_out = group_norm_statistics(hidden, cells.coarse_samples, num_groups, eps)
        group_norm_apply(hidden, cells.coarse_samples, statistics_out, scale_out, shift_out, True, features_out)
        out = gather_convs(features_out, cells.neighbors, conv_out, bias_out, added=skip)
        ctx.save_for_backward(x, features, hidden, statistics_in, statistics_out, vectors, weights)
        ctx.cells, ctx.dtypes = cells, (k.dtype, v.dtype, position.dtype, keys_in.dtype)
        return out[0], out[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, dv):
        x, features, hidden, statistics_in, statistics_out, vectors, weights = ctx.saved_tensors
        cells, (k_dtype, v_dtype, position_dtype, weight_dtype) = ctx.cells, ctx.dtypes
        scale_in, shift_in, scale_out, shift_out, *_ = vectors
        conv_in, conv_out = weights.split(2)
        dconvolved = torch.empty_like(features)  # gradients of the outputs of the convolutions
        dhidden, dout = dconvolved.split(2)
        torch.stack((dk, dv), out=dout)
        dnorms, dx = torch.empty_like(vectors[:4]), torch.empty_like(x)
        dscale_in, dshift_in, dscale_out, dshift_out = dnorms
        dactivated = gather_convs(dout, cells.neighbors, conv_out, transposed=True)
        group_norm_backward(
            dactivated, hidden, cells.coarse_samples, statistics_out, scale_out, shift_out, True,
            dhidden, dscale_out, dshift_out,
        )  # fmt: skip
        dpooled = gather_convs(dhidden, cells.neighbors, conv_in, transposed=True)
        dweights, dbiases = gather_convs_gradients(features, cells.neighbors, dconvolved, weight_dtype)
        pooled = Pooled(cells.parent, cells.tokens, skip=dout)
        group_norm_backward(
            dpooled, x, cells.samples, statistics_in, scale_in, shift_in, True, dx, dscale_in, dshift_in, pooled
        )
        dposition = segment_sum_triton(dx[0], cells.places).to(position_dtype)
        dvectors = *dnorms.flatten(0, 1).unbind(), *dbiases.to(vectors.dtype).unbind()
        return dx[0].to(k_dtype), dx[1].to(v_dtype), dposition, None, None, None, None, *dvectors, *dweights.unbind()


def pooled_conv_compression_triton(
    k: Tensor, v: Tensor, position: Tensor, parameters: list[Tensor], cells: Cells, num_groups: int, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pooled_conv_compression`: k and v (N, C) -> compressed keys and values (Nc, C)."""
    return _PooledConvCompression.apply(k, v, position, cells, num_groups, eps, dtype, *parameters)
