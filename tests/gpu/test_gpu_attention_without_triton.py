"""Attention on a GPU without Triton: by torch's FlashAttention, or its memory-efficient attention, as on Windows."""

from dataclasses import replace

import pytest
import torch

from d3ds2.kernels import devices
from d3ds2.kernels.packed_attention import packed_attention_reference, packed_attention_with_lse
from d3ds2.kernels.selection_attention import selection_attention, selection_attention_reference
from tests.kernels.test_selection_attention import make_problem

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest number


@pytest.fixture(params=[True, False], ids=["flash", "no-flash"], autouse=True)
def without_triton(request, monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    card = devices.abilities(device)
    lesser = replace(card, triton=False, flash=card.flash and request.param)
    monkeypatch.setitem(devices._ABILITIES, device, lesser)


def results(function, tensors, dtype):
    """Return the output of a function of q, k and v in a dtype, and their gradients, all in float64."""
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = function(*tensors)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64, device="cuda")
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, tensors, dout.to(out.dtype)))]


def compare(function, reference, tensors, dtype):
    rounded = [tensor.detach().to(dtype) for tensor in tensors]
    expected = results(reference, rounded, torch.float64)
    for name, a, e in zip(("out", "dq", "dk", "dv"), results(function, rounded, dtype), expected, strict=True):
        error = ((a - e).abs().max() / e.abs().max()).item()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g} of its largest number"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("Hk", "G", "D"), [(2, 16, 32), (1, 3, 64)])
def test_selection_attention(dtype, Hk, G, D):
    *tensors, offsets, indices = make_problem([300, 1, 0, 90, 33], Hk, G, D, 3, empty_query=True)
    compare(
        lambda q, k, v: selection_attention(q, k, v, offsets, indices),
        lambda q, k, v: selection_attention_reference(q, k, v, offsets, indices, D**-0.5),
        tensors,
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("Hk", "G", "D"), [(2, 16, 32), (8, 1, 64)])
def test_packed_attention(dtype, Hk, G, D):
    torch.manual_seed(0)
    lengths_q, lengths_k = [100, 0, 7, 40], [33, 5, 200, 0]
    q = torch.randn(sum(lengths_q), Hk * G, D, device="cuda")
    k, v = (torch.randn(sum(lengths_k), Hk, D, device="cuda") for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *x], device="cuda").cumsum(0).int() for x in (lengths_q, lengths_k))
    compare(
        lambda q, k, v: packed_attention_with_lse(q, k, v, cu_q, cu_k, lengths_q, lengths_k)[0],
        lambda q, k, v: packed_attention_reference(q, k, v, lengths_q, lengths_k),
        [q, k, v],
        dtype,
    )
