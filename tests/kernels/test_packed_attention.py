"""The kernels of attention over packed samples against the definition: output and gradients."""

import pytest
import torch

from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.packed_attention import packed_attention

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "H", "G", "D"),
    [
        pytest.param([40, 3], [50, 7], 2, 1, 32, id="two-samples"),
        pytest.param([5, 0, 6], [3, 4, 0], 1, 3, 24, id="without-queries-and-without-keys"),
        pytest.param([0], [5], 1, 1, 16, id="no-queries"),
        pytest.param([70, 3], [40, 7], 1, 2, 64, id="64-channels"),
        pytest.param([5, 66], [70, 2], 1, 1, 128, id="128-channels"),
    ],
)
def test_matches_the_definition(lengths_q, lengths_k, H, G, D):
    from d3ds2.kernels.packed_attention_triton import packed_attention_triton

    shapes = (sum(lengths_q), H * G, D), (sum(lengths_k), H, D), (sum(lengths_k), H, D)
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    edges = [torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in (lengths_q, lengths_k)]
    weight = torch.randn(shapes[0], device=DEVICE)
    actual = packed_attention_triton(*inputs, *edges, D**-0.5)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = packed_attention(*exact, *edges, lengths_q, lengths_k)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    if len(actual):
        gradients = torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, exact, weight.double())
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
