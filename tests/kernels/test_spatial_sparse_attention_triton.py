"""The kernels of spatial sparse attention against the definition: outputs and every gradient."""

import dataclasses

import pytest
import torch

from d3ds2.geometry.attention_plan import attention_plan
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.spatial_sparse_attention import spatial_sparse_attention_reference
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new tensors with NaN, or with an index out of range: a kernel must write all that is read."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            far = float("nan") if out.is_floating_point() else min(1 << 20, torch.iinfo(out.dtype).max)
            return out.fill_(far)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def queries_ranked_together(monkeypatch):
    """Rank 16 queries at a time: the interpreter takes as long for 16 as for one. test_block_scores.py tests both."""
    from d3ds2.kernels import block_scores_triton

    tile = dataclasses.replace(block_scores_triton.FP32, ranked=16)
    monkeypatch.setattr(block_scores_triton, "FP32", tile)


def outputs_and_gradients(attention, inputs, weight):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs)
    return out, *torch.autograd.grad(out, inputs, weight)


@pytest.mark.parametrize(
    ("counts", "resolution", "c", "shift", "H", "G", "D", "top_k"),
    [
        pytest.param([20, 0, 9], 16, 4, 4, 2, 2, 16, 2, id="ragged-c4"),
        pytest.param([24], 32, 8, 0, 1, 16, 16, 3, id="one-sample-c8"),
        pytest.param([15, 8], 16, 2, 0, 1, 3, 8, 9, id="more-than-all-blocks"),
        pytest.param([20], 128, 8, 4, 1, 2, 16, 3, id="c8-where-blocks-and-cells-differ-in-order"),
        pytest.param([1], 16, 8, 4, 1, 1, 16, 1, id="one-token"),
    ],
)
def test_matches_the_definition(counts, resolution, c, shift, H, G, D, top_k):
    from d3ds2.kernels.spatial_sparse_attention_triton import spatial_sparse_attention_triton

    voxels = random_voxels(counts, resolution).to(DEVICE)
    N, Nc = len(voxels), len(voxels.coarsen(c)[0])
    shapes = (N, H * G, D), (N, H, D), (N, H, D), (Nc, H, D), (Nc, H, D)
    inputs = [torch.randn(shape).to(DEVICE) for shape in shapes] + [torch.rand(N, 3).to(DEVICE)]
    weight = torch.randn(N, H * G, D).to(DEVICE)
    plan = attention_plan(voxels, c, 8, shift)
    expected = outputs_and_gradients(lambda *x: spatial_sparse_attention_reference(*x, plan, top_k), inputs, weight)
    others = plan, top_k, D**-0.5
    actual = outputs_and_gradients(lambda *x: spatial_sparse_attention_triton(*x, *others), inputs, weight)
    with torch.no_grad():
        assert torch.equal(spatial_sparse_attention_triton(*inputs, *others), actual[0])
    names = "out", "dq", "dk", "dv", "dcompressed_k", "dcompressed_v", "dgates"
    for name, a, e in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_torch_compile_leaves_it_alone():
    from d3ds2.kernels.uncompiled import spatial_sparse_attention_triton

    voxels, H, G, D = random_voxels([20, 9], 16).to(DEVICE), 1, 2, 16
    N, Nc = len(voxels), len(voxels.coarsen(4)[0])
    shapes = (N, H * G, D), (N, H, D), (N, H, D), (Nc, H, D), (Nc, H, D)
    inputs = [torch.randn(shape).to(DEVICE) for shape in shapes] + [torch.rand(N, 3).to(DEVICE)]
    weight, plan = torch.randn(N, H * G, D).to(DEVICE), attention_plan(voxels, 4, 8, 0)

    def layer(q, *others):
        return spatial_sparse_attention_triton(q * 2, *others, plan, 2, D**-0.5).sin()

    expected = outputs_and_gradients(layer, inputs, weight)
    actual = outputs_and_gradients(torch.compile(layer, backend="eager"), inputs, weight)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
