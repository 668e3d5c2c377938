"""The memory estimates against peaks that torch's profiler measures on the CPU: enough, but not far too much."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks import activation_memory as estimate
from d3ds2.networks.activation_memory import WORKSPACE
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from d3ds2.rectified_flow import mean_velocity

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def peak(function) -> int:
    """Return the peak bytes that the second run of `function` allocates."""
    with torch.no_grad():
        function()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most


def check(estimated: int, measured: int, at_most: float = 2.5, workspace: int = WORKSPACE) -> None:
    assert measured <= estimated, f"{estimated} bytes estimated, {measured} measured"
    assert estimated - workspace <= at_most * measured, f"{estimated} bytes estimated, only {measured} measured"


def sphere(resolution: int) -> Voxels:
    grid = torch.cartesian_prod(*[torch.arange(resolution)] * 3)
    distance = ((grid + 0.5) / resolution * 2 - 1).norm(dim=1) - 0.8
    return Voxels.sort(torch.nn.functional.pad(grid[distance.abs() < 1.2 / resolution], (1, 0)), resolution)[0]


def fresh(voxels: Voxels) -> Voxels:
    """Return the same voxels without tables, so that the memory of the tables counts too."""
    return Voxels(voxels.coords, voxels.resolution, voxels.batch_size)


def image_tokens(channels: int, count: int = 300) -> ImageTokens:
    index = torch.arange(count, dtype=torch.int32)
    coords = torch.stack([index * 0, index % 20, index // 20, index * 0], 1)
    return ImageTokens(torch.randn(count, channels), coords, torch.ones(count, dtype=torch.bool), 1)


@DTYPES
def test_tokens_of_several_views(dtype):
    encoder = ImageEncoderConfig(hidden_size=1024)
    count = 1 + encoder.num_registers + (encoder.image_size // encoder.patch_size) ** 2
    tokens = image_tokens(encoder.hidden_size, count).to(dtype=dtype)
    config = StructureDiTConfig(hidden_size=16, depth=1, num_heads=2, context_size=1024, resolution=2)
    dit, x_t = StructureDiT(config).to(dtype), torch.randn(1, config.latent_channels, 2, 2, 2)
    one, six = (peak(lambda views=views: mean_velocity(dit, [tokens] * views, 3.0)(x_t, 0.5)) for views in (1, 6))
    estimates = [estimate.image_tokens_bytes(encoder, views, dtype) for views in (1, 6)]
    check(estimates[1] - estimates[0], six - one, workspace=0)


@DTYPES
def test_latent_dit(dtype):
    config = LatentDiTConfig(hidden_size=512, depth=2, num_heads=16, num_kv_heads=1, context_size=64)
    dit, voxels, tokens = LatentDiT(config).to(dtype), sphere(32), image_tokens(64)
    x_t, t = torch.randn(len(voxels), 16), torch.full((1,), 0.5)
    empty, estimated = (estimate.latent_dit_bytes(config, T, dtype, torch.device("cpu")) for T in (0, len(voxels)))
    check(estimated, peak(lambda: dit(x_t, t, fresh(voxels), tokens)), workspace=empty)


@DTYPES
def test_structure_dit(dtype):
    config = StructureDiTConfig(resolution=12, hidden_size=256, depth=2, num_heads=8, context_size=64)
    dit, tokens = StructureDiT(config).to(dtype), image_tokens(64)
    x_t, t = torch.randn(1, 8, 12, 12, 12), torch.full((1,), 0.5)
    check(estimate.structure_dit_bytes(config, 1, dtype), peak(lambda: dit(x_t, t, tokens)))


@DTYPES
def test_structure_vae(dtype):
    sizes = {"encoder_res_blocks": 1, "decoder_res_blocks": 1, "decoder_middle_blocks": 1}
    config = StructureVAEConfig(encoder_widths=(16, 32, 48), decoder_widths=(48, 32, 16), **sizes)
    vae, latents = StructureVAE(config).to(dtype), torch.randn(1, 8, 8, 8, 8)
    check(estimate.structure_vae_bytes(config, 8, dtype), peak(lambda: vae.decode(latents)), at_most=6)


@DTYPES
@pytest.mark.parametrize(("hidden_size", "voxel_place"), [(128, True), (512, True), (512, False)])
def test_sdf_encoder(dtype, hidden_size, voxel_place):
    sizes = {"num_heads": 4, "encoder_depth": 1, "decoder_depth": 1, "group_norm_groups": 2}
    config = SDFVAEConfig(hidden_size=hidden_size, voxel_place=voxel_place, **sizes)
    vae, coarse = SDFVAE(config).to(dtype), sphere(12)
    coords = fresh(coarse).subdivide()[0].subdivide()[0].subdivide()[0].coords
    active = Voxels.sort(coords[torch.rand(len(coords)) < 0.4], 96)[0]
    sdf = torch.rand(len(active), 1)
    check(estimate.sdf_encode_bytes(config, len(active), dtype), peak(lambda: vae.encode(sdf, fresh(active))))


@DTYPES
def test_image_encoder(dtype):
    config = ImageEncoderConfig(image_size=224, hidden_size=384, depth=2, num_heads=6)
    encoder, pixels = ImageEncoder(config).to(dtype), torch.rand(1, 4, 224, 224, dtype=dtype)
    check(estimate.image_encoder_bytes(config, 1, dtype), peak(lambda: encoder(pixels)))
