"""Linear layers in training over many rows: gradients of weights that are never rounded, and sums inside of products.

Under autocast, torch rounds the gradient of a weight to half precision before it casts it back. Here a product of half
precision writes that gradient in the dtype of the weight, and several layers of the same input add its gradient up in
their products. Torch's own layers run elsewhere than on a GPU with Triton, without gradients, and over fewer rows: they
launch their kernels three times as fast.

Sizes named in this file:
    N  rows      C  channels of the input      O  channels of an output
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .devices import abilities, autocast_dtype, half_on_triton

MANY_ROWS = 32768  # from which the GPU is the limit; with fewer the host is
JOINED = 256  # output channels below which weights share a product
MULTIPLE = 8  # of the output channels of a product: fewer leave the tensor cores idle
WRITES_WIDER = "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8 a product has a dtype of its own


def trains_by_hand(x: Tensor) -> bool:
    """Whether these functions, and not torch's layers, take x (..., C): in training, where Triton runs."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not half_on_triton(x):
        return False
    return x.numel() >= MANY_ROWS * x.shape[-1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias for x (..., C), weight (O, C), bias (O,): (..., O), in the dtype of autocast or of x."""
    if not trains_by_hand(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def projections(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x weightᵀ for x (N, C) and each of the weights (O, C): (N, O) each, contiguous."""
    if not trains_by_hand(x):
        return [F.linear(x, weight) for weight in weights]
    return list(_Projections.apply(x, *weights))


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, added: Tensor | None = None) -> Tensor:
    """Return a b + added in a dtype, by default that of a.

    Where the device can, it does not round to the dtype of a and b on the way to float32.

    Args:
        a, b: (N, C) and (C, O).
        dtype: of the result; only without `added`.
        added: (O,) or (N, O).
    """
    if added is not None:
        return torch.addmm(added, a, b)
    if dtype is None or dtype == a.dtype:
        return a @ b
    if WRITES_WIDER and a.is_cuda and abilities(a.device).backend == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def gelu_of_product(a: Tensor, b: Tensor, added: Tensor) -> Tensor:
    """Return GELU (tanh) of a b + added: a (N, C), b (C, O), added (O,) -> (N, O).

    In half precision a GPU of NVIDIA does both in one pass, and then GELU takes numbers that are not rounded.
    """
    if a.is_cuda and abilities(a.device).backend == "cuda" and a.dtype != torch.float32:
        return torch._addmm_activation(added, a, b, use_gelu=True)
    return F.gelu(product(a, b, added=added), approximate="tanh")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        dtype = autocast_dtype(x.device) or x.dtype
        rows, w = x.to(dtype).reshape(-1, x.shape[-1]), weight.to(dtype)
        out = product(rows, w.t(), added=None if bias is None else bias.to(dtype))
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        ctx.shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        rows, w = ctx.saved_tensors
        dout = dout.reshape(-1, dout.shape[-1])
        dx = None if w is None else product(dout, w).view(ctx.shape).to(ctx.x_dtype)
        dweight = None if rows is None else product(dout.t(), rows, ctx.weight_dtype)
        return dx, dweight, dout.sum(0, dtype=ctx.weight_dtype) if ctx.needs_input_grad[2] else None


class _Projections(torch.autograd.Function):
    """Weights of at least JOINED channels have a product each; all others share one, filled up with zeros."""

    @staticmethod
    def forward(ctx, x, *weights):
        dtype = autocast_dtype(x.device) or x.dtype
        rows, outputs, saved = x.to(dtype), {}, []
        narrow = [i for i, weight in enumerate(weights) if len(weight) < JOINED]
        for i, weight in enumerate(weights):
            if i not in narrow:
                saved.append(weight.to(dtype))
                outputs[i] = product(rows, saved[-1].t())
        if narrow:
            sizes = [len(weights[i]) for i in narrow]
            sizes.append(-sum(sizes) % MULTIPLE)  # zeros
            saved.append(torch.cat([*(weights[i] for i in narrow), rows.new_zeros(sizes[-1], x.shape[1])]).to(dtype))
            parts = product(rows, saved[-1].t()).split(sizes, dim=1)
            outputs |= {i: part.contiguous() for i, part in zip(narrow, parts, strict=False)}
        ctx.save_for_backward(rows, *saved)
        ctx.narrow, ctx.x_dtype, ctx.weight_dtypes = narrow, x.dtype, [weight.dtype for weight in weights]
        return tuple(outputs[i] for i in range(len(weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        rows, *saved = ctx.saved_tensors
        wide = [i for i in range(len(douts)) if i not in ctx.narrow]
        gradients, sizes, dweights = [douts[i] for i in wide], [douts[i].shape[1] for i in ctx.narrow], {}
        if sizes:
            sizes.append(len(saved[-1]) - sum(sizes))  # the zeros
            parts = [douts[i] for i in ctx.narrow]
            gradients.append(torch.cat([*parts, rows.new_zeros(len(rows), sizes[-1])], dim=1))
            if any(ctx.needs_input_grad[1 + i] for i in ctx.narrow):
                parts = product(gradients[-1].t(), rows, ctx.weight_dtypes[ctx.narrow[0]]).split(sizes)
                dweights = {i: part.to(ctx.weight_dtypes[i]) for i, part in zip(ctx.narrow, parts, strict=False)}
        dweights |= {
            i: product(gradient.t(), rows, ctx.weight_dtypes[i])
            for i, gradient in zip(wide, gradients, strict=False)
            if ctx.needs_input_grad[1 + i]
        }
        dx = product(gradients[0], saved[0])
        for gradient, weight in zip(gradients[1:], saved[1:], strict=True):
            dx = product(gradient, weight, added=dx)
        return dx.to(ctx.x_dtype), *(dweights.get(i) for i in range(len(douts)))
