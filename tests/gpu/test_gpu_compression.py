"""On a CUDA device: the compression of keys and values against fp64, and in a CUDA graph."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.structures import surface_voxels
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention
from tests.kernels.test_compression import outputs_and_gradients

pytestmark = pytest.mark.gpu
H, HK, D = 32, 2, 32
FORMS = [4, 8]


def make_module(c, dtype):
    torch.manual_seed(0)
    module = SpatialSparseAttention(H * D, H, HK, c, c == 4, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter)).copy_(parameter.to(dtype))
    return module


@pytest.mark.parametrize("c", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_the_definition(dtype, c):
    voxels = surface_voxels(9000, "cpu")
    module = make_module(c, dtype)
    k, v = (torch.randn(len(voxels), HK * D).to(dtype) for _ in range(2))
    results = []
    for device, kind in (("cpu", torch.float64), ("cpu", dtype), ("cuda", dtype)):
        twin, there = copy.deepcopy(module).to(device, kind), voxels.to(device)
        compress = lambda k, v, twin=twin, there=there: twin.compress(k, v, there)  # noqa: E731
        results.append(outputs_and_gradients(twin, compress, k.to(device, kind), v.to(device, kind)))
    exact, same, ours = results
    for name, e in exact.items():
        rounding = (2e-6 if dtype == torch.float32 else 0) * e.norm()
        assert (ours[name] - e).norm() <= 2 * (same[name] - e).norm() + rounding, name


@pytest.mark.parametrize("c", FORMS)
def test_in_a_cuda_graph_and_through_a_checkpoint(c):
    voxels = surface_voxels(5000, "cuda")
    module = make_module(c, torch.bfloat16).to("cuda", torch.bfloat16)
    k, v = (torch.randn(len(voxels), HK * D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    compress = lambda k, v: module.compress(k, v, voxels)  # noqa: E731
    with torch.no_grad():
        expected = compress(k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = compress(k, v)
        for out in outputs:
            out.zero_()
        graph.replay()
        assert all(torch.equal(out, e) for out, e in zip(outputs, expected, strict=True))
    plain = outputs_and_gradients(module, compress, k, v)
    again = outputs_and_gradients(module, lambda k, v: checkpoint(compress, k, v, use_reentrant=False), k, v)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
