"""The Triton kernels of convolutions of dense volumes against their definitions."""

import pytest
import torch

from d3ds2.kernels.volume_conv import adaptive_conv_reference, channel_moments_reference, volume_conv_reference
from d3ds2.kernels.volume_conv_triton import adaptive_conv_triton, channel_moments_triton, volume_conv_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in Triton's interpreter, see conftest.py
SIZE = (4, 5, 7)


@pytest.mark.parametrize(
    ("edge", "C", "D", "channels", "normed", "residual"),
    [(3, 1, 0, 8, False, False), (3, 8, 0, 8, True, True), (3, 32, 8, 27, True, False), (3, 48, 70, 80, True, True),
     (1, 32, 8, 8, False, False)],
)  # fmt: skip
def test_convolution(edge, C, D, channels, normed, residual):
    torch.manual_seed(0)
    size = SIZE if channels < 64 else (2, 3, 2)
    V = size[0] * size[1] * size[2]
    x, y = torch.randn(V, C), torch.randn(V, D) if D else None
    weight, bias = torch.randn(channels, C + D, edge, edge, edge) * 0.1, torch.randn(channels)
    norm = (torch.randn(C + D), torch.randn(C + D)) if normed else None
    rest = torch.randn(V, channels) if residual else None
    given = x, size, weight, bias, y, norm, rest
    on_device = [
        [part.to(DEVICE) for part in value] if value is norm and norm else
        value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in given
    ]  # fmt: skip
    torch.testing.assert_close(
        volume_conv_triton(*on_device).cpu(), volume_conv_reference(*given), atol=1e-4, rtol=1e-4
    )


def test_moments(monkeypatch):
    x = torch.randn(1000, 20) * torch.rand(20) + 50
    for size in (8192, 256):
        monkeypatch.setattr("d3ds2.kernels.volume_conv_triton.SLICE", size)
        mean, variance = (value.cpu() for value in channel_moments_triton(x.to(DEVICE)))
        expected = channel_moments_reference(x)
        torch.testing.assert_close(mean, expected[0], rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(variance, expected[1], rtol=1e-4, atol=0)


def test_adaptive_convolution():
    x, weights = torch.randn(140, 8), torch.randn(140, 27)
    actual = adaptive_conv_triton(x.to(DEVICE), SIZE, weights.to(DEVICE))
    torch.testing.assert_close(actual.cpu(), adaptive_conv_reference(x, SIZE, weights), atol=1e-5, rtol=1e-4)
