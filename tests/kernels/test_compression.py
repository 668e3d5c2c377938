"""Compression of keys and values together, by its kernels and its definitions, against the layers applied to each."""

import copy

import pytest
import torch

from d3ds2.kernels import compression, gather_conv_triton
from d3ds2.layers import spatial_sparse_attention
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention
from tests.kernels.test_group_norm import nan_in_what_is_not_written  # noqa: F401 (a fixture)
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in Triton's interpreter, see conftest.py
NAMES = ["compressed k", "compressed v", "dk", "dv"]


@pytest.fixture(autouse=True, params=["kernels", "definitions"])
def form(request, monkeypatch):
    """Run `compress_together` once with the kernels and once with their definitions in torch."""
    monkeypatch.setattr(compression, "half_on_triton", lambda x: request.param == "kernels")


@pytest.fixture(autouse=True)
def several_slices(monkeypatch):
    monkeypatch.setattr(gather_conv_triton, "MIN_SLICE", 32)
    monkeypatch.setattr(gather_conv_triton, "SLICE", 32)
    monkeypatch.setattr(gather_conv_triton, "BLOCK_N", 16)
    monkeypatch.setattr(gather_conv_triton, "SUMMED", 4096)


def make_case(counts, heads, head_dim, c, dtype):
    """Module and inputs in fp64, with numbers that dtype can hold."""
    torch.manual_seed(0)
    voxels = random_voxels(counts, 8)
    module = SpatialSparseAttention(4 * heads * head_dim, 4 * heads, heads, c, c == 4, 2, head_dim=head_dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.to(dtype))
    k, v = (torch.randn(len(voxels), heads * head_dim).to(dtype).double() for _ in range(2))
    return module.double(), voxels, k, v


def outputs_and_gradients(module, function, k, v, seed=0):
    """Return results by name: both outputs, and all gradients of a random weighting of them."""
    parameters = {n: p for n, p in module.named_parameters() if n.startswith(("compress", "block_position"))}
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    outputs = [out.flatten(1) for out in function(k, v)]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, (k, v, *parameters.values()), weights)
    named = dict(zip([*NAMES, *parameters], [*outputs, *gradients], strict=True))
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


def by_modules(module, k, v, voxels):
    """Apply the layers of `compress` to keys and values separately, on any device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spatial_sparse_attention, "compresses_together", lambda k: False)
        return module.compress(k, v, voxels)


def run_kernels(module, voxels, k, v, dtype):
    twin, voxels = copy.deepcopy(module).to(DEVICE, dtype), voxels.to(DEVICE)
    return outputs_and_gradients(
        twin, lambda k, v: twin.compress_together(k, v, voxels), k.to(DEVICE, dtype), v.to(DEVICE, dtype)
    )


@pytest.mark.parametrize(
    ("c", "counts", "heads", "head_dim"),
    [(4, [40, 0, 1, 20], 2, 10), (4, [1], 1, 4), (4, [0, 50], 1, 40), (8, [70, 0, 1, 300], 2, 10), (8, [1], 2, 40)],
)
def test_results_and_gradients(c, counts, heads, head_dim):
    module, voxels, k, v = make_case(counts, heads, head_dim, c, torch.float32)
    expected = outputs_and_gradients(module, lambda k, v: by_modules(module, k, v, voxels), k, v)
    actual = run_kernels(module, voxels, k, v, torch.float32)
    for name, e in expected.items():
        scale = e.abs().max().clamp(min=1e-3 if len(voxels) > 1 else 10)  # gradients of a single token are nearly zero
        assert (actual[name] - e).abs().max() < 1e-4 * scale, name


HALF = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # the interpreter has no dot in bf16


@pytest.mark.parametrize("c", [4, 8])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_the_definition(dtype, c):
    module, voxels, k, v = make_case([40, 15], 1, 40, c, dtype)
    exact = outputs_and_gradients(module, lambda k, v: by_modules(module, k, v, voxels), k, v)
    actual = run_kernels(module, voxels, k, v, dtype)
    half = copy.deepcopy(module).to(dtype)
    theirs = outputs_and_gradients(half, lambda k, v: by_modules(half, k, v, voxels), k.to(dtype), v.to(dtype))
    for name, e in exact.items():
        assert actual[name].dtype == theirs[name].dtype == dtype
        assert (actual[name] - e).norm() <= 2 * (theirs[name] - e).norm(), name


@pytest.mark.parametrize("c", [4, 8])
def test_autocast_keeps_dtypes(c):
    module, voxels, k, v = make_case([20, 15], 1, 40, c, torch.float32)
    module, voxels = module.float().to(DEVICE), voxels.to(DEVICE)
    k, v = k.to(DEVICE, torch.float16), v.to(DEVICE, torch.float16)
    with torch.autocast(DEVICE, torch.float16):
        actual = outputs_and_gradients(module, lambda k, v: module.compress_together(k, v, voxels), k, v)
        expected = outputs_and_gradients(module, lambda k, v: by_modules(module, k, v, voxels), k, v)
    for name, e in expected.items():
        assert actual[name].dtype == e.dtype, name
        assert (actual[name].float() - e.float()).norm() <= 0.05 * e.float().norm(), name


def test_same_bits_again():
    module, voxels, k, v = make_case([20], 1, 4, 4, torch.float32)
    first, again = (run_kernels(module, voxels, k, v, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
