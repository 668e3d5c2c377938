"""Linear layers by hand: outputs and gradients against torch's layers, in the interpreter or on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from d3ds2.kernels import linear as by_hand
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.linear import linear, product, projections
from d3ds2.layers.linear import Linear, project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
HALF = torch.bfloat16


@pytest.fixture
def trained(monkeypatch):
    monkeypatch.setattr(by_hand, "half_on_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(by_hand, "MANY_ROWS", 0)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def gradients_of(outputs, inputs):
    torch.manual_seed(1)
    given = [torch.randn(out.shape, dtype=torch.float64).to(out) for out in outputs]
    return torch.autograd.grad(outputs, inputs, given)


@pytest.mark.parametrize("shape", [(50, 24), (2, 7, 24), (0, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_in_float32(shape, has_bias, trained):
    x, weight, bias = random(*shape, dtype=torch.float32), random(40, 24, dtype=torch.float32), None
    inputs = [x, weight]
    if has_bias:
        inputs.append(bias := random(40, dtype=torch.float32))
    actual, wanted = linear(x, weight, bias), F.linear(x, weight, bias)
    assert "_Linear" in type(actual.grad_fn).__name__
    torch.testing.assert_close(actual, wanted)
    for a, w in zip(gradients_of([actual], inputs), gradients_of([wanted], inputs), strict=True):
        torch.testing.assert_close(a, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("x_dtype", [torch.float32, HALF])
def test_under_autocast_weights_keep_the_dtype_of_their_gradients(x_dtype, trained):
    """Far closer to float64 than gradients of weights that are rounded to half precision."""
    x, weight, bias = (
        random(64, 24, dtype=x_dtype),
        random(40, 24, dtype=torch.float32),
        random(40, dtype=torch.float32),
    )
    with torch.autocast(DEVICE, dtype=HALF):
        out = linear(x, weight, bias)
    assert out.dtype == HALF
    gradients = gradients_of([out], (x, weight, bias))
    assert [g.dtype for g in gradients] == [x_dtype, torch.float32, torch.float32]
    exact = [t.detach().to(HALF).double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.linear(*exact)
    torch.testing.assert_close(out.double(), wanted, atol=0.05, rtol=0.02)
    torch.manual_seed(1)
    given = torch.randn(out.shape, dtype=torch.float64).to(HALF).to(wanted)
    for g, w in zip(gradients, torch.autograd.grad(wanted, exact, given), strict=True):
        torch.testing.assert_close(g.double(), w, atol=0.05, rtol=0.02)
    if DEVICE == "cuda":
        assert (gradients[1].double() - w).norm() < 1e-4 * w.norm() or by_hand.WRITES_WIDER is False


@pytest.mark.parametrize("sizes", [(300, 20, 20, 3), (300, 256), (8,), (3, 5)])
def test_projections(sizes, trained):
    x, weights = random(30, 24, dtype=torch.float32), [random(size, 24, dtype=torch.float32) for size in sizes]
    actual, wanted = projections(x, weights), [F.linear(x, weight) for weight in weights]
    for a, w in zip(actual, wanted, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, w)
    inputs = [x, *weights]
    for a, w in zip(gradients_of(actual, inputs), gradients_of(wanted, inputs), strict=True):
        torch.testing.assert_close(a, w, atol=1e-4, rtol=1e-4)


def test_frozen_weights_get_no_gradient(trained):
    x, frozen, trainable = random(9, 16, dtype=torch.float32), *(random(4, 16, dtype=torch.float32) for _ in range(2))
    frozen.requires_grad_(False)
    sum(out.sum() for out in projections(x, [frozen, trainable])).backward()
    linear(x, frozen).sum().backward()
    assert frozen.grad is None and trainable.grad is not None
    wanted = 2 * frozen.sum(0) + trainable.sum(0)
    torch.testing.assert_close(x.grad, wanted.expand(9, -1).detach())


def test_an_adapter_takes_the_place_of_a_layer(trained):
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return 2 * x[:, :4]

    x, layer = random(9, 16, dtype=torch.float32), Linear(16, 8, bias=False).to(DEVICE)
    adapted = project(x, [layer, Doubled()])
    torch.testing.assert_close(adapted[1], 2 * x[:, :4])
    torch.testing.assert_close(adapted[0], project(x, [layer])[0])


def test_few_rows_take_torchs_layers(trained, monkeypatch):
    monkeypatch.setattr(by_hand, "MANY_ROWS", 6)
    weight = random(4, 8, dtype=torch.float32)
    for shape, taken in (((2, 3, 8), True), ((5, 8), False)):
        out = linear(random(*shape, dtype=torch.float32), weight)
        assert ("_Linear" in type(out.grad_fn).__name__) == taken


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_product(dtype):
    a, b = (torch.randn(16, 16).to(DEVICE, HALF) for _ in range(2))
    assert product(a, b, dtype).dtype == dtype
    torch.testing.assert_close(product(a, b, dtype).double(), a.double() @ b.double(), atol=0.05, rtol=0.02)
