"""The refiners by Triton against their definition."""

import pytest
import torch
from torch.nn import functional as F

from d3ds2.kernels.volume_conv_triton import adaptive_conv_triton, channel_moments_triton, volume_conv_triton
from d3ds2.networks import refiner_rows
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from tests.parity.test_parity_refiner import network
from tests.support.golden import golden, over

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in Triton's interpreter, see conftest.py
SIZE = (4, 5, 7)


def rows_of(volume):
    """(1, C, X, Y, Z) -> (V, C)."""
    return volume[0].flatten(1).t().contiguous()


def volume_of(rows, size):
    """(V, C) -> (1, C, X, Y, Z)."""
    return rows.t().unflatten(1, size)[None]


def convolution(x, size, weight, bias, y=None, norm=None, residual=None):
    """What `volume_conv_triton` makes."""
    h = volume_of(x if y is None else torch.cat([x, y], dim=1), size)
    if norm is not None:
        scale, shift = (value[:, None, None, None] for value in norm)
        h = F.silu(h * scale + shift)
    out = rows_of(F.conv3d(h, weight, bias, padding=weight.shape[-1] // 2))
    return out if residual is None else out + residual


def adaptive_convolution(x, size, weights):
    """What `adaptive_conv_triton` makes."""
    shares, padded = volume_of(F.normalize(weights, p=1.0, dim=1), size), F.pad(volume_of(x, size), (1,) * 6)
    (X, Y, Z), out = size, 0
    for k in range(27):
        i, j, l = k // 9, k // 3 % 3, k % 3  # noqa: E741
        out = out + shares[:, k : k + 1] * padded[:, :, i : i + X, j : j + Y, l : l + Z]
    return rows_of(out)


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
    torch.testing.assert_close(volume_conv_triton(*on_device).cpu(), convolution(*given), atol=1e-4, rtol=1e-4)


def test_moments(monkeypatch):
    x = torch.randn(1000, 20) * torch.rand(20) + 50
    for size in (8192, 256):
        monkeypatch.setattr("d3ds2.kernels.volume_conv_triton.SLICE", size)
        mean, variance = (value.cpu().float() for value in channel_moments_triton(x.to(DEVICE)))
        torch.testing.assert_close(mean, x.mean(0))
        torch.testing.assert_close(variance, x.var(0, correction=0), rtol=1e-4, atol=0)


def test_adaptive_convolution():
    x, weights = torch.randn(140, 8), torch.randn(140, 27)
    actual = adaptive_conv_triton(x.to(DEVICE), SIZE, weights.to(DEVICE))
    torch.testing.assert_close(actual.cpu(), adaptive_convolution(x, SIZE, weights), atol=1e-5, rtol=1e-4)


def test_refiners(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(refiner_rows, "WIDE", 6)  # both ways of the norm
    monkeypatch.setattr(refiner_rows, "SLAB_BYTES", 1 << 12)
    if DEVICE == "cpu":  # the interpreter would take minutes; what the kernels make is tested above
        monkeypatch.setattr(refiner_rows, "volume_conv_triton", convolution)
        monkeypatch.setattr(refiner_rows, "adaptive_conv_triton", adaptive_convolution)
    monkeypatch.setattr(refiner_rows, "SLAB_BYTES", 1 << 12)
    sizes = {"widths": (4, 8, 12), "layers": 2, "middle_layers": 1, "patch_size": 8}
    signs, refiner = SignRefiner(SignRefinerConfig(**sizes)), Refiner(RefinerConfig(**sizes, feature_channels=4))
    sdf, seen = torch.randn(2, 1, 8, 8, 8), torch.randn(2, 4, 8, 8, 8)
    expected = signs(sdf).detach(), refiner(sdf, seen).detach()
    monkeypatch.setattr("d3ds2.networks.refiner._by_rows", lambda _x: True)
    with torch.no_grad():
        actual = signs.to(DEVICE)(sdf.to(DEVICE)), refiner.to(DEVICE)(sdf.to(DEVICE), seen.to(DEVICE))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
@over("refiner_xl*", "refiner_sign*", holding="outputs/out")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float16, 3e-2)])
def test_refiners_on_a_gpu(name, dtype, tolerance):
    """Triton is what runs there; the whole networks, against the definition on the CPU."""
    data = golden(name)
    model, sdf = network(data), data.inputs["sdf"]
    given = (sdf,) if isinstance(model, SignRefiner) else (sdf, torch.randn(1, model.config.widths[0], *sdf.shape[2:]))
    expected = model(*given).detach()
    with torch.no_grad():
        actual = model.to("cuda", dtype)(*(x.to("cuda", dtype) for x in given)).float().cpu()
    rms = expected.square().mean().sqrt()
    assert ((actual - expected).abs().max() / rms).item() < tolerance
