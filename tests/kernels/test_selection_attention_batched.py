"""Batched selection attention against its definition: outputs and gradients."""

import pytest
import torch

from d3ds2.kernels.selection_attention import selection_attention_reference
from d3ds2.kernels.selection_attention_batched import CHUNK_BYTES, selection_attention_batched
from tests.kernels.test_selection_attention import DEVICE, make_problem, outputs_and_gradients

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def batched(chunk_bytes):
    return lambda *problem: selection_attention_batched(*problem, chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [pytest.param(CHUNK_BYTES, id="whole"), pytest.param(2000, id="in-chunks")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("block_sizes", "Hk", "G", "D", "S"),
    [
        pytest.param([5, 1, 7], 1, 16, 16, 2, id="three-small-blocks"),
        pytest.param([3], 1, 16, 32, 4, id="one-block-fewer-than-S"),
        pytest.param([90, 1, 40], 2, 16, 16, 2, id="more-queries-than-a-tile"),
        pytest.param([6, 0, 8, 0, 3], 2, 3, 24, 2, id="empty-blocks"),
        pytest.param([4, 5, 2], 2, 1, 5, 3, id="no-groups-and-odd-width"),
    ],
)
def test_matches_the_definition(block_sizes, Hk, G, D, S, dtype, chunk_bytes):
    problem = make_problem(block_sizes, Hk, G, D, S, dtype, empty_query=True)
    expected = outputs_and_gradients(selection_attention_reference, *problem)
    actual = outputs_and_gradients(batched(chunk_bytes), *problem)
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(a, e, **close, msg=lambda m, name=name: f"{name}: {m}")


def test_takes_tensors_that_are_not_contiguous():
    q, k, v, block_offsets, block_indices = make_problem([9, 4, 12], 2, 3, 8, 2, torch.float64)
    expected = outputs_and_gradients(selection_attention_reference, q, k, v, block_offsets, block_indices)
    apart = [torch.stack([x.detach(), x.detach()], dim=-1).transpose(0, 1) for x in (q, k, v)]
    views = [x.transpose(0, 1)[..., 0].requires_grad_() for x in apart]
    chosen = block_indices.transpose(0, 2).contiguous().transpose(0, 2)
    actual = outputs_and_gradients(batched(CHUNK_BYTES), *views, block_offsets, chosen)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_same_result_twice():
    problem = make_problem([40, 3, 21], 2, 4, 16, 2)
    for a, b in zip(*(outputs_and_gradients(batched(CHUNK_BYTES), *problem) for _ in range(2)), strict=True):
        assert DEVICE == "cuda" or a.equal(b)  # a GPU adds the gradients of keys in any order


def test_no_query_selects_a_block():
    q, k, v, block_offsets, block_indices = make_problem([3, 2], 1, 2, 8, 1)
    nothing = torch.full_like(block_indices, -1)
    for x in outputs_and_gradients(batched(CHUNK_BYTES), q, k, v, block_offsets, nothing):
        assert x.eq(0).all()


def test_products_of_other_devices(monkeypatch):
    """The products that run on neither a CPU nor FlashAttention."""
    import d3ds2.kernels.tiled_attention as tiled_attention

    monkeypatch.setattr(tiled_attention, "attends_on_cpu", lambda q: False)
    problem = make_problem([20, 1, 12], 2, 4, 8, 2, torch.float64, empty_query=True)
    expected = outputs_and_gradients(selection_attention_reference, *problem)
    for a, e in zip(outputs_and_gradients(batched(3000), *problem), expected, strict=True):
        torch.testing.assert_close(a, e)
