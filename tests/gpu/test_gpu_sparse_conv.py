"""Sparse convolution and group norm on a CUDA device without Triton.  python -m pytest tests -m gpu

The convolution runs by torch alone and, where it is installed, by spconv.
"""

import pytest
import torch

from d3ds2.kernels import devices, gather_conv, gather_conv_chunks, gather_conv_spconv, group_norm
from d3ds2.kernels.gather_conv import dense_weight, submanifold_conv, take_rows
from d3ds2.layers.sparse_conv import PackedGroupNorm
from tests.kernels.test_gather_conv_torch import CASES, by_definition, inputs, outputs_and_gradients
from tests.support.random_voxels import random_voxels

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def without_triton(monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setattr(devices, "_ABILITIES", {})
    devices.pretend(torch.device("cuda", torch.cuda.current_device()), triton=False)


def check(case, dtype):
    """Compare outputs and gradients with those of the definition in float64 on the CPU."""
    given = inputs(*case, counts=(700, 0, 900))
    rounded = [tensor.to(dtype).double() if tensor.is_floating_point() else tensor for tensor in given]
    expected = outputs_and_gradients(by_definition, *rounded, case[0])
    there = [tensor.to("cuda", dtype) if tensor.is_floating_point() else tensor.cuda() for tensor in given]
    actual = outputs_and_gradients(submanifold_conv, *there, case[0])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and (a.cpu() - e).abs().max() < tolerance * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_chunks(case, dtype, monkeypatch):
    monkeypatch.setattr(devices, "HAS_SPCONV", False)
    monkeypatch.setattr(gather_conv_chunks, "GATHER_BYTES", 1 << 20)
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [300, 10**6])
def test_spconv(case, dtype, rows, monkeypatch):
    pytest.importorskip("spconv")
    monkeypatch.setattr(gather_conv_spconv, "GATHER_BYTES", rows * gather_conv_spconv.TABLE_BYTES)
    assert gather_conv._on_spconv(torch.zeros(1, 1, dtype=dtype, device="cuda"))
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("children", [1, 8])
def test_some_rows_of_the_result(children, dtype, monkeypatch):
    x, neighbors, weight, bias = (tensor.cuda() for tensor in inputs(children, 16, 8))
    some = torch.randperm(len(x), device="cuda")[:70]
    weight = dense_weight(weight, children)
    expected = gather_conv.gather_conv_reference(x, neighbors, weight, bias).view(len(x), -1)[some].view(-1, 8)
    actual = gather_conv.gather_conv(x.to(dtype), neighbors[:, some], weight.to(dtype), bias.to(dtype))
    assert (actual - expected).abs().max() < 3e-3 * expected.abs().max()


def test_bytes_of_the_chunks():
    voxels = random_voxels([400_000], 128).to("cuda")
    x, weight = torch.randn(len(voxels), 32, device="cuda").half(), torch.randn(27, 32, 32, device="cuda").half()
    neighbors, bias = voxels.neighbors, torch.zeros(32, device="cuda").half()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    submanifold_conv(x, neighbors, weight, bias)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 2 * x.nbytes + gather_conv.workspace_bytes(x.device) + (16 << 20)  # and what cuBLAS takes


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 33, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_take_rows(channels, dtype):
    x = torch.randn(517, channels, device="cuda", dtype=dtype)
    order = torch.randperm(517, device="cuda")
    assert torch.equal(take_rows(x, order), x[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("counts", [(70_000, 0, 90_001), (50_000,)])
def test_group_norm(counts, dtype, monkeypatch):
    monkeypatch.setattr(group_norm, "SLAB_BYTES", 1 << 20)
    monkeypatch.setattr(group_norm, "half_on_triton", lambda x: False)
    voxels, norm = random_voxels(list(counts), 64), PackedGroupNorm(2, 32)
    x, dout = (torch.randn(len(voxels), 32).to(dtype) for _ in range(2))
    expected = norm_and_gradients(norm.double(), x.double(), voxels, dout.double())
    actual = norm_and_gradients(norm.to("cuda", dtype), x.cuda(), voxels.to("cuda"), dout.cuda())
    for a, e in zip(actual, expected, strict=True):
        assert (a.cpu() - e).abs().max() < (1e-4 if dtype == torch.float32 else 4e-3) * e.abs().max()


def norm_and_gradients(norm, x, voxels, dout):
    x = x.detach().requires_grad_()
    out = norm(x, voxels, silu=True)
    return out, *torch.autograd.grad(out, (x, norm.weight, norm.bias), dout)
