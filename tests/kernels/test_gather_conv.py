"""The Triton kernels of the submanifold convolution and of row permutations against their definitions."""

import pytest
import torch

from d3ds2.kernels import gather_conv_triton
from d3ds2.kernels.gather_conv import dense_weight, gather_conv_gradients_triton, submanifold_conv
from d3ds2.kernels.gather_conv_triton import gather_convs_gradients, take_rows_triton
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in Triton's interpreter, see conftest.py


@pytest.mark.parametrize(
    ("children", "Cin", "Cout"),
    [(1, 1, 3), (1, 16, 16), (1, 70, 20), (1, 8, 80), (8, 1, 3), (8, 16, 16), (8, 70, 4), (8, 8, 10)],
)
def test_convolution_and_gradients(children, Cin, Cout, monkeypatch):
    monkeypatch.setattr(gather_conv_triton, "SLICE", 128)  # several partial sums
    if (children, Cin) != (1, 16):  # else a program has 16 voxels, and Triton's interpreter takes long for each
        monkeypatch.setattr(gather_conv_triton, "CONV_PROGRAMS", 1)
    torch.manual_seed(0)
    voxels = random_voxels([150, 0, 1], 10)
    taps = 27 if children == 1 else 64
    x, weight = torch.randn(len(voxels), Cin, requires_grad=True), torch.randn(taps, Cin, Cout, requires_grad=True)
    bias = torch.randn(Cout, requires_grad=True)
    out = submanifold_conv(x, voxels.neighbors, weight, bias, children)  # the definition: this is a CPU
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, weight, bias), dout)

    x, weight, neighbors = (tensor.detach().to(DEVICE) for tensor in (x, weight, voxels.neighbors))
    actual = gather_conv_triton.gather_conv_triton(x, neighbors, dense_weight(weight, children))
    torch.testing.assert_close(actual.view(out.shape).cpu() + bias.detach(), out.detach(), atol=1e-3, rtol=1e-4)
    gradients = gather_conv_gradients_triton(x, neighbors, weight, dout.to(DEVICE), children)
    for name, a, e in zip(("x", "weight", "bias"), gradients, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, atol=1e-3, rtol=1e-4, msg=lambda m, name=name: f"d{name}: {m}")


def test_no_voxel():
    neighbors = torch.zeros(27, 0, dtype=torch.int32, device=DEVICE)
    x = torch.zeros(0, 4, device=DEVICE)
    assert gather_conv_triton.gather_conv_triton(x, neighbors, torch.zeros(27, 4, 5, device=DEVICE)).shape == (0, 5)
    dout = torch.zeros(1, 0, 5, device=DEVICE)
    assert gather_convs_gradients(x[None], neighbors, dout, torch.float32)[0].eq(0).all()


@pytest.mark.parametrize("channels", [1, 8, 33])
def test_take_rows(channels):
    x = torch.randn(517, channels, device=DEVICE)
    order = torch.randperm(517, device=DEVICE)
    assert torch.equal(take_rows_triton(x, order), x[order])
