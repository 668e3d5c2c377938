"""Batched attention of packed segments against its definition: outputs, softmax denominators and gradients."""

import pytest
import torch

from d3ds2.kernels.packed_attention import packed_attention, packed_attention_with_lse_reference
from d3ds2.kernels.packed_attention_batched import CHUNK_BYTES, packed_attention_batched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make_problem(lengths_q, lengths_k, Hk, G, D, dtype):
    torch.manual_seed(0)
    shapes = (sum(lengths_q), Hk * G, D), (sum(lengths_k), Hk, D), (sum(lengths_k), Hk, D)
    return [torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes]


def outputs_and_gradients(attend, inputs, *arguments):
    out, lse = attend(*inputs, *arguments)
    torch.manual_seed(1)
    return out, lse, *torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out))


@pytest.mark.parametrize("chunk_bytes", [pytest.param(CHUNK_BYTES, id="whole"), pytest.param(3000, id="in-chunks")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "Hk", "G", "D"),
    [
        pytest.param([40, 3], [50, 7], 2, 1, 32, id="two-samples"),
        pytest.param([5, 0, 6, 2], [3, 4, 0, 8], 2, 3, 24, id="without-queries-and-without-keys"),
        pytest.param([1, 30, 2, 17, 5, 64, 33] * 3, [1, 30, 2, 17, 5, 64, 33] * 3, 1, 16, 16, id="windows"),
        pytest.param([600, 2], [20, 700], 1, 16, 4, id="longer-than-a-tile"),
        pytest.param([7], [5], 2, 2, 8, id="one-segment"),
    ],
)
def test_matches_the_definition(lengths_q, lengths_k, Hk, G, D, dtype, chunk_bytes):
    inputs, lengths = make_problem(lengths_q, lengths_k, Hk, G, D, dtype), (lengths_q, lengths_k)
    expected = outputs_and_gradients(packed_attention_with_lse_reference, inputs, *lengths)
    actual = outputs_and_gradients(packed_attention_batched, inputs, *lengths, None, chunk_bytes)
    assert actual[1].dtype == torch.float32
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        tolerance = 1e-5 if name == "lse" else TOLERANCE[dtype]
        largest = max(1.0, e.abs().nan_to_num(posinf=0.0).max().item())  # sums over 9,600 rows have its rounding errors
        torch.testing.assert_close(
            a, e, atol=tolerance * largest, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_takes_tensors_that_are_not_contiguous():
    lengths = [4, 9, 2]
    qkv = torch.randn(15, 3, 2, 8, device=DEVICE)
    out, lse = packed_attention_batched(*qkv.unbind(1), lengths, lengths)
    expected = packed_attention_with_lse_reference(*qkv.unbind(1), lengths, lengths)
    torch.testing.assert_close((out, lse), expected)


def test_half_precision_keeps_its_dtype():
    q, k, v = (x.detach().bfloat16() for x in make_problem([4, 9], [4, 9], 1, 2, 8, torch.float32))
    out, lse = packed_attention_batched(q, k, v, [4, 9], [4, 9])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_segments_that_are_all_empty():
    edges = torch.tensor([0, 0, 3], dtype=torch.int32)
    q, none = torch.randn(3, 2, 8), torch.randn(0, 2, 8)
    assert packed_attention(q, none, none, edges, edges * 0, [0, 3], [0, 0]).eq(0).all()


def test_denominators_carry_no_gradient():
    inputs = make_problem([4, 9], [4, 9], 1, 2, 8, torch.float32)
    assert not packed_attention_batched(*inputs, [4, 9], [4, 9])[1].requires_grad
