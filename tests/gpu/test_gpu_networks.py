"""On a CUDA device: every network and kernel gives the results that it gives on the CPU.

python -m pytest tests -m gpu -n 8    # most of the time goes into compiling kernels, so workers help
"""

import copy

import numpy as np
import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels.packed_attention import packed_attention, packed_attention_with_lse
from d3ds2.kernels.selection_attention import selection_attention, selection_attention_reference
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_fp32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)


def sphere_voxels(radii, resolution):
    """Return a surface-like batch, a spherical shell for each radius in voxels; radius 0 gives an empty sample."""
    centre = np.stack(np.meshgrid(*[np.arange(resolution) + 0.5] * 3, indexing="ij"), -1) - resolution / 2
    distance = np.linalg.norm(centre, axis=-1)
    shells = [np.argwhere((np.abs(distance - r) < 0.9) & (r > 0)) for r in radii]
    rows = [np.insert(shell, 0, i, axis=1) for i, shell in enumerate(shells)]
    return Voxels.sort(torch.from_numpy(np.concatenate(rows)).int(), resolution, len(radii))[0]


def randomised(model):
    """Add noise to all parameters, because layers initialised with zeros would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def relative_error(actual, expected):
    expected = expected.float()
    return ((actual.float().cpu() - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt().item()


def check_network(model, run, tolerance=1e-4, half_tolerance=5e-2):
    """Compare the tensor `run(model, device)` on CPU and GPU: in fp32 with gradients, and loosely in bf16 autocast."""
    model = randomised(model)
    twin = copy.deepcopy(model).cuda()
    expected, actual = run(model, "cpu"), run(twin, "cuda")
    assert relative_error(actual.detach(), expected.detach()) < tolerance
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (actual * weight.cuda()).sum().backward()
    gradients = [(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    together = torch.cat([p.flatten() for p, _ in gradients if p is not None])
    assert relative_error(torch.cat([q.flatten() for _, q in gradients if q is not None]), together) < 20 * tolerance
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert relative_error(run(twin, "cuda").detach(), expected.detach()) < half_tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_attention(dtype):
    lengths_q, lengths_k = [5, 0, 300, 64], [40, 3, 17, 0]
    q, k, v = torch.randn(369, 16, 32), torch.randn(60, 2, 32), torch.randn(60, 2, 32)
    offsets = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    expected, expected_lse = packed_attention_with_lse(q, k, v, *offsets, lengths_q, lengths_k)
    args = [o.cuda() for o in offsets]
    q, k, v = (x.cuda().to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = packed_attention_with_lse(q, k, v, *args, lengths_q, lengths_k)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(out, expected) < tolerance
    finite = expected_lse.isfinite()
    torch.testing.assert_close(lse.cpu()[finite], expected_lse[finite], atol=tolerance, rtol=tolerance)
    assert torch.equal(lse.cpu().isfinite(), finite)
    assert relative_error(packed_attention(q, k, v, *args, lengths_q, lengths_k), expected) < tolerance
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(("G", "D"), [(16, 16), (16, 32), (4, 32), (32, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_attention(G, D, dtype):
    sizes, H, S = [1, 70, 512, 3, 64, 200], 2, 3
    T, M = sum(sizes), len(sizes)
    q, k, v = torch.randn(T, H * G, D), torch.randn(T, H, D), torch.randn(T, H, D)
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    blocks = torch.rand(T, H, M).topk(S).indices.sort(-1).values.int()
    blocks[0] = -1
    arguments = [x.to(dtype).float().requires_grad_() for x in (q, k, v)]
    expected = selection_attention_reference(*arguments, offsets, blocks, D**-0.5)
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, arguments, weight)
    on_gpu = [x.detach().cuda().to(dtype).requires_grad_() for x in arguments]
    out = selection_attention(*on_gpu, offsets.cuda(), blocks.cuda())
    gradients = torch.autograd.grad(out, on_gpu, weight.cuda().to(dtype))
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2  # fp32: the matrix units multiply in TF32
    for actual, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(actual, wanted) < tolerance


def test_sdf_vae():
    voxels = sphere_voxels([20, 27.3], 64)
    config = SDFVAEConfig(hidden_size=64, num_heads=4, encoder_depth=2, decoder_depth=2, group_norm_groups=2)
    sdf = torch.rand(len(voxels), 1) * 2 - 1

    def run(model, device):
        mean, logvar, latent_voxels = model.encode(sdf.to(device), voxels.to(device))
        decoded, fine = model.decode(mean + 0.1 * logvar, latent_voxels)
        assert torch.equal(fine.coords.cpu(), Voxels(fine.coords.cpu(), 64, 2).coords)
        return decoded

    check_network(SDFVAE(config), run)


def test_structure_vae():
    config = StructureVAEConfig(
        encoder_widths=(8, 16, 32),
        decoder_widths=(32, 16, 8),
        encoder_res_blocks=1,
        encoder_middle_blocks=1,
        decoder_res_blocks=1,
        decoder_middle_blocks=1,
    )
    occupancy = (torch.rand(2, 1, 32, 32, 32) < 0.1).float()

    def run(model, device):
        return model.decode(model.encode(occupancy.to(device))[0])

    check_network(StructureVAE(config), run)


@pytest.fixture
def encoder():
    config = ImageEncoderConfig(image_size=56, hidden_size=64, depth=2, num_heads=2)
    return ImageEncoder(config)


@pytest.fixture
def images():
    images = torch.rand(3, 4, 56, 56)
    images[:, 3] = 0
    images[:, 3, 10:40, 5:30] = 1
    return images


def test_image_encoder_and_structure_dit(encoder, images):
    config = StructureDiTConfig(resolution=8, hidden_size=64, depth=2, num_heads=4, context_size=64)
    x, t = torch.randn(3, 8, 8, 8, 8), torch.tensor([0.2, 0.7, 1.0])
    model = torch.nn.ModuleDict({"encoder": encoder, "dit": StructureDiT(config)})

    def run(model, device):
        return model["dit"](x.to(device), t.to(device), model["encoder"](images.to(device)))

    check_network(model, run)


@pytest.mark.parametrize("pooled_conv", [True, False])
@pytest.mark.parametrize("sparse_context", [True, False])
def test_latent_dit(encoder, images, pooled_conv, sparse_context):
    config = LatentDiTConfig(
        hidden_size=256,
        depth=2,
        num_heads=16,
        num_kv_heads=1,
        context_size=64,
        compression_block=4 if pooled_conv else 8,
        pooled_conv=pooled_conv,
        top_k=64,  # every block; otherwise rounding would decide near ties
        sparse_context=sparse_context,
    )
    voxels = sphere_voxels([5, 0, 7.5], 32)
    x, t = torch.randn(len(voxels), 16), torch.tensor([0.2, 0.7, 1.0])
    with torch.no_grad():
        tokens = encoder(images)

    def run(model, device):
        return model(x.to(device), t.to(device), voxels.to(device), tokens.to(device, torch.float32))

    check_network(LatentDiT(config), run, tolerance=2e-3)
