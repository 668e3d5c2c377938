"""The feed-forward layers in training over many rows: of the hidden layer, the widest tensor, at most one is held.

In the backward pass GELU, its gradient and the sum of it over the rows take one pass over the hidden layer. Where the
result is kept, because the block is computed twice, the backward pass computes the hidden layer again by one product.

Sizes named in this file:
    N  rows      C  channels      F  channels of the hidden layer
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .devices import autocast_dtype
from .kept import Kept, computed
from .linear import gelu_of_product, product, trains_by_hand


def feed_forward(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, kept: Kept | None = None
) -> Tensor:
    """Return `feed_forward_reference` of its arguments, in the dtype of autocast or of x.

    `kept` keeps the result, if it is computed twice.
    """
    if not trains_by_hand(x):
        return feed_forward_reference(x, up, up_bias, down, down_bias)
    return _FeedForward.apply(x, up, up_bias, down, down_bias, kept)


def feed_forward_reference(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Linear, GELU (tanh), Linear: x (..., C), up (F, C), up_bias (F,), down (C, F), down_bias (C,) -> (..., C)."""
    hidden = functional.gelu(functional.linear(x, up, up_bias), approximate="tanh")
    return functional.linear(hidden, down, down_bias)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, up_bias, down, down_bias, kept):
        dtype = autocast_dtype(x.device) or x.dtype
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        w_up, b_up, w_down, b_down = (parameter.to(dtype) for parameter in (up, up_bias, down, down_bias))
        preactivation = None

        def compute():
            nonlocal preactivation
            if kept is None:
                preactivation = product(rows, w_up.t(), added=b_up)
                hidden = functional.gelu(preactivation, approximate="tanh")
            else:
                hidden = gelu_of_product(rows, w_up.t(), b_up)
            return [product(hidden, w_down.t(), added=b_down)]

        (out,) = computed(kept, compute)
        ctx.save_for_backward(rows, w_up, b_up, w_down, preactivation)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, up.dtype, up_bias.dtype, down.dtype, down_bias.dtype)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        from .feed_forward_triton import gelu_backward

        rows, w_up, b_up, w_down, preactivation = ctx.saved_tensors
        x_dtype, *dtypes = ctx.dtypes
        dout = dout.reshape(-1, dout.shape[-1])
        computed_again = preactivation is None
        if computed_again:
            preactivation = product(rows, w_up.t(), added=b_up)
        hidden, dpreactivation, dup_bias = gelu_backward(preactivation, product(dout, w_down), in_place=computed_again)
        dx = product(dpreactivation, w_up).view(ctx.shape).to(x_dtype)
        if not any(ctx.needs_input_grad[1:]):
            return dx, None, None, None, None, None
        ddown, ddown_bias = product(dout.t(), hidden, dtypes[2]), dout.sum(0, dtype=dtypes[3])
        del hidden, preactivation
        return dx, product(dpreactivation.t(), rows, dtypes[0]), dup_bias.to(dtypes[1]), ddown, ddown_bias, None
