"""RMS norm of heads: kernels against the definition, output and gradients."""

import pytest
import torch

from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.head_norm import head_rms_norm, head_rms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 30, 3, 16), (1, 40, 2, 5), (0, 2, 2, 8)])
def test_output_and_gradients(shape, dtype, monkeypatch):
    from d3ds2.kernels import head_norm_triton

    for name, value in (("TOKENS", 16), ("BACKWARD_TOKENS", 32), ("BLOCK_T", 16)):
        monkeypatch.setattr(head_norm_triton, name, value)  # several programs, in several steps
    *batch, H, D = shape
    qkv = torch.randn(*batch, 3, H, D).to(DEVICE, dtype).requires_grad_()  # queries and keys lie beside each other
    gamma = torch.randn(H, D).to(DEVICE).requires_grad_()
    actual = head_norm_triton.head_rms_norm_triton(qkv[..., 1, :, :], gamma)
    wanted = head_rms_norm_reference(qkv[..., 1, :, :], gamma)
    assert actual.dtype == dtype and actual.shape == shape
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(actual, wanted, **close)
    dout = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(out, (qkv, gamma), dout) for out in (actual, wanted)]
    for a, w in zip(*gradients, strict=True):
        torch.testing.assert_close(a, w, **close)


def test_a_vector_of_zeros_stays_zero():
    from d3ds2.kernels.head_norm_triton import head_rms_norm_triton

    x, gamma = torch.zeros(3, 2, 8, device=DEVICE).requires_grad_(), torch.ones(2, 8, device=DEVICE)
    for norm in (head_rms_norm_triton, head_rms_norm_reference):
        out = norm(x, gamma)
        assert not out.any()
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
        torch.testing.assert_close(dx, torch.full_like(dx, 8**0.5 * 1e12))


@pytest.mark.gpu
def test_on_the_gpu_by_its_public_name():
    x, gamma = torch.randn(700, 16, 64, device="cuda").bfloat16(), torch.randn(16, 64, device="cuda")
    torch.testing.assert_close(head_rms_norm(x, gamma), head_rms_norm_reference(x, gamma), atol=0.02, rtol=0.01)
