"""Shapes, order, batches, precision and training of the SDF autoencoder."""

import dataclasses

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig

CONFIG = SDFVAEConfig(
    latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=2, decoder_depth=2, group_norm_groups=2
)


def ball(resolution, radius, batch_size=1, band=2.0):
    """Return the SDF of balls over the band, (N, 1), and its active voxels."""
    centres = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    grid = torch.cartesian_prod(centres, centres, centres)
    sdf = (
        ((grid.norm(dim=1) - radius) * resolution / 2 / band).view(1, *[resolution] * 3).expand(batch_size, -1, -1, -1)
    )
    active = sdf.abs() < 1
    voxels, order = Voxels.sort(active.nonzero(), resolution, batch_size)
    return sdf[active][order, None], voxels


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SDFVAE(CONFIG)


def test_shapes_and_order(model):
    sdf, voxels = ball(64, 0.5)
    mean, logvar, latent_voxels = model.encode(sdf, voxels)
    assert mean.shape == logvar.shape == (len(latent_voxels), 4)
    assert set(map(tuple, latent_voxels.coords.tolist())) == set(map(tuple, voxels.block_coords.tolist()))
    decoded, fine, mean_again, _ = model(sdf, voxels, torch.Generator().manual_seed(0))
    assert decoded.shape == (512 * len(latent_voxels), 1) and decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert torch.equal(mean, mean_again)
    assert torch.equal(fine.block_coords, voxels.block_coords)  # so each row of `view(L, 512)` is a block
    assert fine.resolution == 64 and torch.equal(fine.block_offsets.diff(), torch.full((len(mean),), 512))


def test_batch_is_each_sample_alone(model):
    parts = [ball(64, 0.5), ball(64, 0.3), ball(64, 0.7)]
    sdf, voxels = torch.cat([part[0] for part in parts]), Voxels.cat([part[1] for part in parts])
    empty_first = Voxels.cat([Voxels.sort(torch.zeros(0, 4), 64, 1)[0], voxels])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mean, _, latent_voxels = model.encode(sdf, voxels)
        decoded, fine = model.decode(mean, latent_voxels)
        for i, part in enumerate(parts):
            mean_alone, _, alone = model.encode(*part)
            torch.testing.assert_close(mean[latent_voxels.batch_index == i], mean_alone, atol=1e-5, rtol=1e-4)
            decoded_alone, _ = model.decode(mean_alone, alone)
            torch.testing.assert_close(decoded[fine.batch_index == i], decoded_alone, atol=1e-5, rtol=1e-4)
        shifted, _, shifted_mean, _ = model(sdf, empty_first, generator)
    torch.testing.assert_close(shifted_mean, mean, atol=1e-5, rtol=1e-4)
    assert shifted.isfinite().all()


def test_position_factor_makes_resolutions_alike(model):
    """Coordinates at resolution R are multiplied by position_resolution / R."""
    _, voxels = ball(64, 0.5)
    latent_voxels = voxels.coarsen(8)[0]
    latents = torch.randn(len(latent_voxels), 4)
    default, _ = model.decode(latents, latent_voxels)
    explicit, _ = model.decode(latents, latent_voxels, position_factor=512 / 64)
    other, _ = model.decode(latents, latent_voxels, position_factor=1.0)
    assert torch.equal(default, explicit) and not torch.allclose(default, other, atol=1e-3)


def test_features_lead_to_the_sdf(model):
    _, voxels = ball(64, 0.5)
    latent_voxels = voxels.coarsen(8)[0]
    sdf, features, fine = model.decode_with_features(torch.randn(len(latent_voxels), 4), latent_voxels)
    assert features.shape == (len(fine), CONFIG.hidden_size // 16)
    torch.testing.assert_close(model.decoder.out_layer(features).tanh(), sdf)


def test_learns_a_ball_and_checkpointing_changes_nothing():
    sdf, voxels = ball(64, 0.5)

    def train(checkpointing, steps):
        torch.manual_seed(0)
        model = SDFVAE(CONFIG)
        model.gradient_checkpointing = checkpointing
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(steps):
            decoded, fine, mean, logvar = model(sdf, voxels, generator)
            target = torch.ones(fine.resolution, fine.resolution, fine.resolution)
            target[tuple(voxels.coords[:, 1:].long().t())] = sdf[:, 0]
            wanted = target[tuple(fine.coords[:, 1:].long().t())]
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = (decoded[:, 0] - wanted).square().mean() + 1e-3 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(False, 40)
    assert losses[-1] < 0.5 * losses[0]
    assert train(True, 3) == pytest.approx(losses[:3], rel=1e-5)


def test_every_parameter_gets_a_gradient(model):
    sdf, voxels = ball(64, 0.5)
    decoded, _, mean, logvar = model(sdf, voxels)
    (decoded.square().mean() + mean.square().mean() + logvar.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_half_precision(model, how):
    sdf, voxels = ball(64, 0.5)
    with torch.no_grad():
        mean, _, latent_voxels = model.encode(sdf, voxels)
        decoded, _ = model.decode(mean, latent_voxels)
        if how != "autocast":
            model = model.to(getattr(torch, how))
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            half_mean, _, _ = model.encode(sdf, voxels)
            half_decoded, _ = model.decode(mean, latent_voxels)
    assert half_mean.dtype == half_decoded.dtype == torch.float32
    assert (half_mean - mean).square().mean() < 4e-4 * mean.square().mean()
    assert (half_decoded - decoded).square().mean() < 4e-4 * decoded.square().mean()


def test_normalized_latents_are_inverse():
    model = SDFVAE(dataclasses.replace(CONFIG, latents_scale=2.5, latents_shift=0.25))
    latents = torch.randn(5, 4)
    normal = model.normalize_latents(latents)
    torch.testing.assert_close(normal, (latents - 0.25) * 2.5)
    torch.testing.assert_close(model.denormalize_latents(normal), latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 40}, "divisible by 16 and by num_heads 2, got 40"),
        ({"group_norm_groups": 4}, "hidden_size / 16 = 2, got 4"),
        ({"latents_scale": 0.0}, "other than 0"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_wrong_inputs_are_named(model):
    _, voxels = ball(64, 0.5)
    with pytest.raises(ValueError, match="expected sdf"):
        model.encode(torch.zeros(len(voxels)), voxels)
    with pytest.raises(ValueError, match=r"expected latents \(\d+, 4\)"):
        model.decode(torch.zeros(len(voxels), 5), voxels)
    odd = Voxels.sort(torch.tensor([[0, 1, 1, 1]]), 12)[0]
    with pytest.raises(ValueError, match="divisible by 8, got 12"):
        model.encode(torch.zeros(1, 1), odd)


def slab(y: int) -> tuple[torch.Tensor, Voxels]:
    """Return the SDF and the active voxels of a wide flat surface, whose band is the four voxels from y to y + 3."""
    steps = torch.arange(64)
    coords = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), steps, torch.arange(y, y + 4), steps)
    voxels, order = Voxels.sort(coords, 64, 1)
    return ((coords[:, 2] - y - 1.5) / 2)[order, None], voxels


def test_place_of_voxels_tells_the_halves_of_a_block_apart():
    """Released networks cannot: pooling and submanifold convolutions ignore where in its block a surface lies."""
    torch.manual_seed(0)
    released = SDFVAE(CONFIG)
    placed = SDFVAE(dataclasses.replace(CONFIG, voxel_place=True))
    missing, unexpected = placed.load_state_dict(released.state_dict(), strict=False)
    assert len(missing) == 6 and all(".place" in name for name in missing) and not unexpected
    lower, upper = slab(32), slab(36)
    expected = released.encode(*lower)[0]
    torch.testing.assert_close(released.encode(*upper)[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(placed.encode(*lower)[0], expected)  # at first, the same as without these weights
    decoded = placed(*lower)[0]
    torch.testing.assert_close(decoded.mean(), released(*lower)[0].mean(), atol=0.02, rtol=0)
    decoded.square().mean().backward()
    weights = dict(placed.named_parameters())
    assert all(weights[name].grad.abs().max() > 0 for name in missing)
    for name in missing:
        torch.nn.init.normal_(weights[name], std=0.1)
    assert (placed.encode(*upper)[0] - placed.encode(*lower)[0]).abs().max() > 0.01
