"""The Triton kernels of the group norm of packed samples against their definition, which runs on a CPU."""

import pytest
import torch
from torch.nn import functional as F

from d3ds2.geometry.segments import samples_of
from d3ds2.kernels import group_norm_triton as kernels
from d3ds2.layers.sparse_conv import PackedGroupNorm
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in Triton's interpreter, see conftest.py


@pytest.fixture(autouse=True)
def nan_in_what_is_not_written(monkeypatch):
    """Fill new tensors with NaN, and make tiles so small that a sample has several."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _filled(empty_like(*a, **k)))
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    monkeypatch.setattr(kernels, "MIN_TILE", 8)
    monkeypatch.setattr(kernels, "MAX_BLOCK_N", 16)


def _filled(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def make_case(counts, groups, channels, dtype=torch.float32):
    torch.manual_seed(0)
    voxels, norm = random_voxels(counts, 16), PackedGroupNorm(groups, channels).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(parameter.to(dtype))
    x = torch.randn(len(voxels), channels).to(dtype).double().requires_grad_()
    return voxels, norm, x


def run_kernels(x, norm, voxels, silu, dtype):
    inputs = [tensor.detach().to(DEVICE, dtype).requires_grad_() for tensor in (x, norm.weight, norm.bias)]
    return kernels.group_norm_triton(*inputs, samples_of(voxels.to(DEVICE)), norm.num_groups, norm.eps, silu), inputs


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("counts", "groups", "channels"), [([150, 0, 1, 37], 3, 18), ([1], 4, 4), ([300], 32, 64), ([0, 90], 2, 130)]
)
def test_norm_and_gradients(counts, groups, channels, silu):
    voxels, norm, x = make_case(counts, groups, channels)
    expected = norm(x, voxels)
    expected = F.silu(expected) if silu else expected
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, norm.weight, norm.bias), dout)
    out, inputs = run_kernels(x, norm, voxels, silu, torch.float32)
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), atol=2e-5, rtol=2e-5)
    actual = torch.autograd.grad(out, inputs, dout.to(DEVICE, torch.float32))
    scale = 1e2 if 1 in counts else 1  # a sample of one voxel: 1 / deviation is large
    for name, a, e in zip(("x", "weight", "bias"), actual, gradients, strict=True):
        message = lambda m, name=name: f"d{name}: {m}"  # noqa: E731
        torch.testing.assert_close(a.cpu().double(), e, atol=scale * 1e-4, rtol=1e-4, msg=message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_definition(dtype):
    voxels, norm, x = make_case([200, 30], 4, 8, dtype)
    expected = norm(x, voxels)
    dout = torch.randn_like(expected).to(dtype)
    exact = [expected, *torch.autograd.grad(expected, (x, norm.weight, norm.bias), dout.double())]
    out, inputs = run_kernels(x, norm, voxels, False, dtype)
    ours = [out, *torch.autograd.grad(out, inputs, dout.to(DEVICE))]
    same = norm.to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    out = same(x, voxels)
    theirs = [out, *torch.autograd.grad(out, (x, same.weight, same.bias), dout)]
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == t.dtype == dtype
        factor = 4 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2  # the interpreter rounds to bf16 towards zero
        assert (a.cpu() - e).norm() <= factor * (t - e).norm()


def test_a_large_mean():
    """One-pass variance in fp32 would lose everything here."""
    voxels, norm, x = make_case([500], 2, 4)
    moved = run_kernels(x + 4096.0, norm, voxels, False, torch.float32)[0]
    still = run_kernels(x, norm, voxels, False, torch.float32)[0]
    torch.testing.assert_close(moved, still, atol=4e-3, rtol=0)


def test_no_voxel():
    voxels, norm, x = make_case([0, 0], 2, 4)
    out, inputs = run_kernels(x, norm, voxels, True, torch.float32)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == gradients[0].shape == (0, 4) and gradients[1].eq(0).all() and gradients[2].eq(0).all()
