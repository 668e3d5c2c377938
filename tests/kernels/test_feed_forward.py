"""The feed-forward layers by hand against their definition, with their hidden layer or their result kept."""

import pytest
import torch
from torch.nn import functional as F

from d3ds2.kernels import linear as by_hand
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.feed_forward import feed_forward, feed_forward_reference
from d3ds2.kernels.kept import Kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(params=["hidden layer kept", "result kept"])
def kept(request, monkeypatch):
    """Where the result is kept, if the hidden layer is computed again."""
    monkeypatch.setattr(by_hand, "half_on_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(by_hand, "MANY_ROWS", 0)
    return Kept() if request.param == "result kept" else None


def problem(shape, F, dtype=torch.float32):
    C = shape[-1]
    sizes = shape, (F, C), (F,), (C, F), (C,)
    return [torch.randn(size).to(DEVICE, dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("shape", [(150, 24), (2, 9, 24), (0, 24)])
def test_outputs_and_gradients(shape, kept):
    inputs = problem(shape, 300)
    actual, wanted = feed_forward(*inputs, kept), feed_forward_reference(*inputs)
    assert "_FeedForward" in type(actual.grad_fn).__name__
    torch.testing.assert_close(actual, wanted)
    dout = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, inputs, dout), torch.autograd.grad(wanted, inputs, dout)
    for a, w in zip(*gradients, strict=True):
        torch.testing.assert_close(a, w, atol=1e-4 * max(1.0, w.abs().max().item() if w.numel() else 0), rtol=1e-4)


def test_under_autocast(kept):
    inputs = problem((70, 32), 64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = feed_forward(*inputs, kept)
    assert actual.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted, dout = feed_forward_reference(*exact), torch.randn(70, 32, device=DEVICE)
    close(actual, wanted)
    gradients = torch.autograd.grad(actual, inputs, dout.bfloat16())
    for a, w in zip(gradients, torch.autograd.grad(wanted, exact, dout.double()), strict=True):
        assert a.dtype == torch.float32
        close(a, w)


def close(a, w):
    assert (a.double() - w).norm() < 0.02 * w.norm()


@pytest.mark.parametrize(("N", "width"), [(1, 5), (300, 40), (129, 257)])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_of_gelu(N, width, in_place, monkeypatch):
    from d3ds2.kernels.feed_forward_triton import gelu_backward

    u, dhidden = (3 * torch.randn(N, width, device=DEVICE) for _ in range(2))
    exact = u.double().requires_grad_()
    wanted = F.gelu(exact, approximate="tanh")
    (du,) = torch.autograd.grad(wanted, exact, dhidden.double())
    given = u.clone()
    hidden, actual, total = gelu_backward(given, dhidden, in_place)
    assert (hidden is given) == in_place
    for a, w in ((hidden, wanted), (actual, du), (total, du.sum(0))):
        torch.testing.assert_close(a.double(), w, atol=1e-4, rtol=1e-4)
