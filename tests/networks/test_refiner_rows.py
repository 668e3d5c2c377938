"""The refiners on rows against their definition on volumes. kernels/test_volume_conv.py tests the kernels."""

import pytest
import torch

from d3ds2.networks import refiner_rows
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from tests.parity.test_parity_refiner import network
from tests.support.golden import golden, over

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, the definitions of the kernels run


def test_refiners(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(refiner_rows, "MAX_FUSED_CHANNELS", 6)  # so that both forms of the norm run
    monkeypatch.setattr(refiner_rows, "SLAB_BYTES", 1 << 12)
    sizes = {"widths": (4, 8, 12), "layers": 2, "middle_layers": 1, "patch_size": 8}
    signs, refiner = SignRefiner(SignRefinerConfig(**sizes)), Refiner(RefinerConfig(**sizes, feature_channels=4))
    sdf, seen = torch.randn(2, 1, 8, 8, 8), torch.randn(2, 4, 8, 8, 8)
    expected = signs(sdf).detach(), refiner(sdf, seen).detach()
    monkeypatch.setattr("d3ds2.networks.refiner.rows_are_faster", lambda _x: True)
    with torch.no_grad():
        actual = signs.to(DEVICE)(sdf.to(DEVICE)), refiner.to(DEVICE)(sdf.to(DEVICE), seen.to(DEVICE))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
@over("refiner_xl*", "refiner_sign*", holding="outputs/out")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float16, 3e-2)])
def test_refiners_on_a_gpu(name, dtype, tolerance):
    """Compare whole networks, run by the Triton kernels, with the definition on the CPU.

    The definition takes less than a second. Nearly all of the time goes into compiling the kernels for each dtype.
    """
    data = golden(name)
    model, sdf = network(data), data.inputs["sdf"]
    given = (sdf,) if isinstance(model, SignRefiner) else (sdf, torch.randn(1, model.config.widths[0], *sdf.shape[2:]))
    expected = model(*given).detach()
    with torch.no_grad():
        actual = model.to("cuda", dtype)(*(x.to("cuda", dtype) for x in given)).float().cpu()
    rms = expected.square().mean().sqrt()
    assert ((actual - expected).abs().max() / rms).item() < tolerance
