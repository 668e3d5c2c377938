"""The counted operations are those that torch counts when the networks run."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.structures import surface_voxels
from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from training import flops
from training.flops import Flops, ShapeSize

N, L = 1200, 10
DIT = LatentDiTConfig(
    latent_channels=4, hidden_size=64, depth=2, num_heads=32, num_kv_heads=2, context_size=32, top_k=2
)
FORMS = {
    "v1.0": {},
    "v1.1": {"compression_block": 8, "pooled_conv": False, "sparse_context": False},
    "shared": {"share_modulation": True, "top_k": 1000},
    "windows": {"branches": ("window",)},
    "full": {"attention": "full"},
}


def counted(work) -> dict[str, int]:
    """The operations that torch counts: those of all products, and those of batched products, by operation."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def by_module(work) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def dense_in(counts: dict[str, int]) -> int:
    return sum(count for name, count in counts.items() if name in ("aten.mm", "aten.addmm", "aten.convolution"))


def image_tokens() -> ImageTokens:
    coords = torch.cat([torch.zeros(L, 1), torch.arange(L)[:, None] * torch.ones(1, 3)], dim=1).int()
    return ImageTokens(torch.randn(L, 32), coords, torch.ones(L, dtype=torch.bool), 1)


def size_of(voxels: Voxels, active: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ShapeSize:
    number = len(voxels)
    cells = {c: len(voxels.coarsen(c)[0]) / number for c in (4, 8)}
    pairs = [(np.array(voxels.windows(shift).lengths) ** 2).sum() / number for shift in (0, 4)]
    return ShapeSize(number, active, cells, sum(pairs) / 2)


@pytest.fixture(scope="module")
def voxels() -> Voxels:
    return surface_voxels(N, "cpu")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_dense_products_of_the_latent_dit(voxels, form):
    config = dataclasses.replace(DIT, **form)
    model = LatentDiT(config)
    found = counted(lambda: model(torch.randn(N, 4), torch.ones(1), voxels, image_tokens()))
    assert dense_in(found) == pytest.approx(flops.latent_dit(config, size_of(voxels), L).dense, rel=1e-9)


def test_attention_of_the_latent_dit_by_hand(voxels):
    size = size_of(voxels)
    config = dataclasses.replace(DIT, **FORMS["v1.1"])
    channels, cells = config.hidden_size, len(voxels.coarsen(8)[0])
    windows = 0
    for layer in range(config.depth):  # every query and key of a window, twice: for scores and for values
        lengths = voxels.windows(layer % 2 * 4).lengths
        windows += sum(2 * 2 * length * length * channels for length in lengths)
    selected = 2 * 2 * channels * N * config.top_k * size.neighbours  # a query selects blocks as full as its own
    others = 2 * 2 * N * channels * (cells + L)
    got = flops.latent_dit(config, size, L)
    assert got.attention == pytest.approx(windows + config.depth * (selected + others), rel=1e-9)
    assert got.scores == pytest.approx(config.depth * 2 * N * cells * channels, rel=1e-9)
    everything = flops.latent_dit(dataclasses.replace(config, top_k=1000), size, L)  # no choice, no scores
    assert everything.scores == 0 and everything.attention - got.attention == pytest.approx(
        config.depth * 2 * 2 * channels * N * (N - config.top_k * size.neighbours), rel=1e-9
    )


def test_attention_grows_with_the_tokens_as_ssa_does_not_as_dense_attention():
    def per_token(tokens):
        size = ShapeSize(tokens, (0, 0, 0), {4: 0.1, 8: 0.02}, 60.0)
        return flops.latent_dit(LatentDiTConfig(compression_block=8), size, 100).attention / tokens

    dense = 4 * 1024 * 24 * 100_000
    assert per_token(110_000) - per_token(10_000) == pytest.approx(0.02 * dense, rel=1e-6)


def test_structure_dit():
    config = StructureDiTConfig(
        resolution=4, latent_channels=2, hidden_size=32, depth=2, num_heads=2, context_size=32, qk_rms_norm=True
    )
    model = StructureDiT(config)
    found = counted(lambda: model(torch.randn(1, 2, 4, 4, 4), torch.ones(1), image_tokens()))
    assert dense_in(found) == flops.structure_dit(config, L).dense
    assert flops.structure_dit(config, L).attention == 2 * 2 * 2 * 64 * 32 * (64 + L)


def test_image_encoder():
    config = ImageEncoderConfig(image_size=28, hidden_size=16, depth=2, num_heads=2, num_registers=1)
    found = counted(lambda: ImageEncoder(config)(torch.rand(1, 4, 28, 28)))
    assert dense_in(found) == flops.image_encoder(config).dense


def test_structure_vae():
    config = StructureVAEConfig(2, (8, 16), (16, 8), 1, 2, 2, 1)
    model = StructureVAE(config)
    found = counted(lambda: model(torch.ones(1, 1, 8, 8, 8)))
    assert dense_in(found) == flops.structure_vae(config, 8).dense


@pytest.mark.parametrize("place", [False, True])
def test_sdf_vae(voxels, place):
    """Convolutions that double the resolution are counted by definition: eight taps for each child."""
    config = SDFVAEConfig(4, 32, 2, 1, 1, group_norm_groups=2, voxel_place=place)
    model = SDFVAE(config)
    fine = voxels.subdivide()[0].subdivide()[0].subdivide()[0]
    active = Voxels(fine.coords[::3].contiguous(), fine.resolution, 1, check=False)
    grids = [active, active.coarsen(2)[0], active.coarsen(4)[0]]
    size = size_of(voxels, tuple(len(grid) / N for grid in grids))
    found = by_module(lambda: model.encode(torch.randn(len(active), 1), active))
    assert found["Global"] == pytest.approx(flops.sdf_encoder(config, size).dense, rel=1e-9)
    found = by_module(lambda: model.decode(torch.randn(N, 4), voxels))
    taps = sum(found[f"Decoder.up_blocks.{i}.conv2"] for i in range(3))
    by_definition = sum(2 * N * 8**level * 64 * width**2 for level, width in enumerate((8, 4, 2)))
    assert found["Global"] - taps == pytest.approx(flops.sdf_decoder(config, size).dense - by_definition, rel=1e-9)
    pairs = [
        sum(length**2 for length in voxels.windows(0).lengths),
        sum(length**2 for length in voxels.windows(4).lengths),
    ]
    assert flops.sdf_decoder(config, size).attention == pytest.approx(2 * 2 * 32 * sum(pairs) / 2)
    half = flops.sdf_decoder(config, size, 0.5).dense
    whole, none = flops.sdf_decoder(config, size).dense, flops.sdf_decoder(config, size, 0).dense
    assert half == pytest.approx((whole + none) / 2)


def test_a_step_counts_the_backward_pass_and_what_is_recomputed():
    forward = Flops(100.0, 10.0, 1.0)
    assert forward.step(False) == 300 + 35 + 1 and forward.step(True) == 400 + 45 + 2
    assert forward.step(True, keep_attention=True) == 400 + 35 + 1
    assert forward.step(False, keep_attention=True) == forward.step(False)
    assert (forward + forward.times(2)).forward == 333


def test_cells_that_were_not_counted_are_as_many_as_a_surface_has():
    size = ShapeSize(1000.0, (1.0, 1.0, 1.0), {4: 0.08, 8: 0.02}, 40.0)
    assert size.cells_of(4) == 0.08 and size.cells_of(8) == 0.02
    assert size.cells_of(16) == pytest.approx(0.005) and size.cells_of(1) == 1.0
