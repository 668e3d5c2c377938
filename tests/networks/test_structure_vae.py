"""Shapes, threshold, precision and training of the structure autoencoder."""

import dataclasses

import pytest
import torch

from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig, Upsample

CONFIG = StructureVAEConfig(
    latent_channels=4,
    encoder_widths=(8, 16, 24),
    decoder_widths=(24, 16, 8),
    encoder_res_blocks=1,
    encoder_middle_blocks=1,
    decoder_res_blocks=1,
    decoder_middle_blocks=1,
)


def shells(batch_size, resolution):
    """Return hollow balls of different radii, (B, 1, S, S, S) bool."""
    centres = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    distance = torch.cartesian_prod(centres, centres, centres).norm(dim=1).view(1, 1, *[resolution] * 3)
    radii = torch.linspace(0.4, 0.8, batch_size).view(-1, 1, 1, 1, 1)
    return (distance - radii).abs() < 2 / resolution


@pytest.fixture
def model():
    torch.manual_seed(0)
    return StructureVAE(CONFIG)


def test_shapes(model):
    occupancy = shells(2, 16)
    mean, logvar = model.encode(occupancy)
    assert mean.shape == logvar.shape == (2, 4, 4, 4, 4)
    logits, mean_again, _ = model(occupancy, torch.Generator().manual_seed(0))
    assert logits.shape == (2, 1, 16, 16, 16) and torch.equal(mean, mean_again)
    assert model.decode(torch.randn(1, 4, 2, 3, 4)).shape == (1, 1, 8, 12, 16)


def test_upsample_puts_channels_at_children():
    upsample = Upsample(1, 2)
    torch.nn.init.zeros_(upsample.conv.weight)
    with torch.no_grad():
        upsample.conv.bias.copy_(torch.arange(16))
    out = upsample(torch.zeros(1, 1, 2, 1, 1))
    for c, i, j, k in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
        assert out[0, c, i::2, j::2, k::2].eq(8 * c + 4 * i + 2 * j + k).all()


def test_occupied_is_sorted_and_takes_the_threshold(model):
    logits = torch.full((3, 1, 16, 16, 16), -9.0)
    logits[0, 0, 9, 0, 3] = 0.0
    logits[0, 0, 0, 15, 15] = -2.0  # probability 0.119
    logits[2, 0, 8, 8, 8] = -2.5  # probability 0.076
    voxels = model.occupied(logits)
    assert voxels.coords.tolist() == [[0, 0, 15, 15], [0, 9, 0, 3]]
    assert (voxels.resolution, voxels.counts) == (16, [2, 0, 0])
    assert model.occupied(logits, threshold=0.05).counts == [2, 0, 1]
    assert model.occupied(logits, threshold=0.5).counts == [1, 0, 0]


def test_learns_shells_and_checkpointing_changes_nothing():
    occupancy = shells(2, 16)

    def train(checkpointing, steps):
        torch.manual_seed(0)
        model = StructureVAE(CONFIG)
        model.gradient_checkpointing = checkpointing
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(steps):
            logits, _, _ = model(occupancy, generator)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, occupancy.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(False, 60)
    assert losses[-1] < 0.3 * losses[0]
    assert train(True, 3) == pytest.approx(losses[:3], rel=1e-5)


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_half_precision(model, how):
    occupancy = shells(2, 16)
    with torch.no_grad():
        mean, _ = model.encode(occupancy)
        logits = model.decode(mean)
        if how != "autocast":
            model = model.to(getattr(torch, how))
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            half_mean, _ = model.encode(occupancy)
            half_logits = model.decode(mean)
    assert half_mean.dtype == half_logits.dtype == torch.float32
    assert (half_mean - mean).square().mean() < 4e-4 * mean.square().mean()
    assert (half_logits - logits).square().mean() < 4e-4 * logits.square().mean()


def test_normalized_latents_are_inverse():
    model = StructureVAE(dataclasses.replace(CONFIG, latents_scale=2.5, latents_shift=0.25))
    latents = torch.randn(1, 4, 2, 2, 2)
    normal = model.normalize_latents(latents)
    torch.testing.assert_close(normal, (latents - 0.25) * 2.5)
    torch.testing.assert_close(model.denormalize_latents(normal), latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_widths": (8, 16)}, "as many encoder_widths as decoder_widths"),
        ({"threshold": 1.0}, "threshold between 0 and 1, got 1.0"),
        ({"latents_scale": 0.0}, "other than 0"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_lists_of_widths_become_tuples():
    config = dataclasses.replace(CONFIG, encoder_widths=[8, 16, 24])
    assert config == CONFIG and config.factor == 4


def test_wrong_inputs_are_named(model):
    with pytest.raises(ValueError, match=r"S divisible by 4, got \(1, 1, 6, 8, 8\)"):
        model.encode(torch.zeros(1, 1, 6, 8, 8))
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, X, Y, Z\), got \(1, 8, 4, 4, 4\)"):
        model.decode(torch.zeros(1, 8, 4, 4, 4))
