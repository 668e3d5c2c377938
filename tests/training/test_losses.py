"""The losses, against numbers computed from their definitions."""

import pytest
import torch
from torch.distributions import Bernoulli, kl

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from training.decoded_surface import DecodedSurface
from training.losses import (
    SDFLossConfig,
    StructureLossConfig,
    SurfaceLossConfig,
    kl_divergence,
    sdf_loss,
    sign_divergence,
    structure_loss,
    velocity_loss,
)
from training.structure_targets import DecodedLoss


def test_sdf_loss_is_equation_3():
    target = torch.tensor([-1.0, -0.5, 0.2, 1.0, 0.4, 1.0])
    sdf = torch.tensor([-0.8, -0.1, 0.0, 0.7, 0.4, 1.0])
    sharp = torch.tensor([False, True, False, True, True, False])  # the fourth lies outside the band
    mean, logvar = torch.full((2, 3), 0.5), torch.zeros(2, 3)
    terms = sdf_loss(sdf[:, None], target, sharp, mean, logvar, SDFLossConfig())
    inside, exterior, sharp_error = (0.16 + 0.04 + 0.0) / 3, (0.04 + 0.09 + 0.0) / 3, (0.16 + 0.0) / 2
    expected = {"inside": inside, "exterior": exterior, "sharp": sharp_error, "kl": 0.125}
    expected["sign"] = sign_divergence(sdf, target).mean().item()
    expected["loss"] = 1.0 * inside + 0.1 * exterior + 1.0 * sharp_error + 1e-3 * 0.125
    assert {name: pytest.approx(value.item()) for name, value in terms.items()} == expected


def test_sign_divergence_is_that_of_two_coins():
    target, sdf = torch.tensor([-0.3, 0.02, 1.0]), torch.tensor([0.1, 0.02, -1.0])
    wanted, got = (Bernoulli(logits=-s / 0.1) for s in (target, sdf))
    torch.testing.assert_close(sign_divergence(sdf, target), kl.kl_divergence(wanted, got))
    weighted = sdf_loss(sdf, target, sdf > 2, sdf[None], sdf[None], SDFLossConfig(sign=2.0))
    plain = sdf_loss(sdf, target, sdf > 2, sdf[None], sdf[None], SDFLossConfig())
    assert (weighted["loss"] - plain["loss"]).item() == pytest.approx(2 * plain["sign"].item(), rel=1e-4)


def test_sdf_loss_without_sharp_or_exterior_voxels_is_finite():
    zeros = torch.zeros(4)
    terms = sdf_loss(zeros + 0.5, zeros, zeros.bool(), torch.zeros(1, 2), torch.zeros(1, 2), SDFLossConfig())
    assert terms["loss"].item() == pytest.approx(0.25)
    assert terms["sharp"] == 0 and terms["exterior"] == 0


def test_sdf_loss_names_sizes_that_differ():
    with pytest.raises(ValueError, match=r"sdf \(4, 1\), target \(5,\)"):
        sdf_loss(torch.zeros(4, 1), torch.zeros(5), torch.zeros(5), torch.zeros(1), torch.zeros(1), SDFLossConfig())


def test_kl_divergence_is_that_of_torch():
    torch.manual_seed(0)
    mean, logvar = torch.randn(5, 4), torch.randn(5, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_structure_loss_prefers_the_true_occupancy():
    torch.manual_seed(0)
    occupancy = (torch.rand(2, 1, 4, 4, 4) < 0.2).float()
    posterior = torch.zeros(2, 3, 2, 2, 2), torch.zeros(2, 3, 2, 2, 2)
    config = StructureLossConfig(bce=1.0, dice=1.0, positive_weight=4.0, kl=0.0)
    right = structure_loss((occupancy * 2 - 1) * 20, occupancy, *posterior, config)
    wrong = structure_loss((1 - occupancy * 2) * 20, occupancy, *posterior, config)
    assert right["loss"] < 1e-3 and right["iou"] == 1
    assert wrong["loss"] > 10 and wrong["iou"] == 0
    plain = structure_loss(torch.zeros_like(occupancy), occupancy, *posterior, StructureLossConfig(kl=0.0))
    assert plain["loss"].item() == pytest.approx(0.693147, rel=1e-4)  # log 2
    weighted = structure_loss(torch.zeros_like(occupancy), occupancy, *posterior, config)
    share = occupancy.mean().item()
    assert weighted["bce"].item() == pytest.approx(0.693147 * (4 * share + 1 - share), rel=1e-4)


def test_velocity_loss_counts_tokens_equally():
    x_0, noise = torch.zeros(3, 2), torch.ones(3, 2)
    predicted = torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 1.0]])
    assert velocity_loss(predicted, x_0, noise).item() == pytest.approx(9 / 6)


def decoded_case(decoder_learns: bool):
    torch.manual_seed(0)
    vae = StructureVAE(StructureVAEConfig(2, (8, 8), (8, 8), *[1] * 4))
    vae.decoder.requires_grad_(decoder_learns)
    x_0, predicted = torch.randn(2, 4, 2, 4, 4, 4).unbind(0)
    occupancy = (vae.decode(x_0) > 0).detach()

    def of(rows: list[int], counts: list[bool]) -> torch.Tensor:
        loss = DecodedLoss(vae, StructureLossConfig(dice=0.5), x_0[rows], occupancy[rows], decoder_learns)
        return loss.of(predicted[rows], torch.tensor(counts))

    return vae, x_0, predicted.requires_grad_(), of


def test_decoded_loss_is_that_of_the_samples_at_noise_alone():
    _, x_0, predicted, of = decoded_case(False)
    value = of([0, 1, 2, 3], [True, False, True, False])
    value.backward()
    assert (predicted.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True, False]
    torch.testing.assert_close(value, (of([0], [True]) + of([2], [True])) / 4)
    assert of([0, 1], [False, False]) == 0
    with torch.no_grad():
        predicted.copy_(x_0)
    assert of([0, 1, 2, 3], [True, False, True, False]) < value


def test_a_decoder_that_learns_also_decodes_the_true_latents_of_the_other_samples():
    vae, x_0, predicted, of = decoded_case(True)
    value = of([0, 1], [True, False])
    value.backward()
    assert (predicted.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, False, False]
    assert (vae.decoder.input_conv.weight.grad != 0).all()
    torch.testing.assert_close(value, (of([0], [True]) + of([1], [False])) / 2)
    other = of([1], [False]).item()
    with torch.no_grad():
        predicted.copy_(x_0)
    assert of([1], [True]).item() == pytest.approx(other)


def test_decoded_surface_is_that_of_the_chosen_samples_without_surplus():
    torch.manual_seed(0)
    vae = SDFVAE(SDFVAEConfig(4, 64, 4, 1, 1, 8, 2, 64, True)).requires_grad_(False)
    places = torch.rand(3, 4, 4, 4) < 0.3
    voxels, _ = Voxels.sort(places.nonzero(), 4, 3)
    x_0 = torch.randn(len(voxels), 4) * 0.3
    surplus = torch.rand(len(voxels)) < 0.2
    x_0[surplus] = 2.0
    predicted = (x_0 + 0.5 * torch.randn_like(x_0)).requires_grad_()
    loss = DecodedSurface(vae, SurfaceLossConfig(weight=2.0))
    chosen = torch.tensor([True, False, True])
    value = loss.of(predicted, x_0, voxels, ~surplus, chosen, places)
    value.backward()
    counts = chosen[voxels.batch_index] & ~surplus
    assert counts.any() and surplus[chosen[voxels.batch_index]].any()
    assert torch.equal(predicted.grad.abs().sum(1) > 0, counts)
    single = []
    for sample in range(3):
        of_sample = counts & (voxels.batch_index == sample)
        if of_sample.any():
            part = Voxels.sort(voxels.coords[of_sample] * torch.tensor([0, 1, 1, 1]), 4, 1)[0]
            sdf, target = (vae.decode(vae.denormalize_latents(x[of_sample]), part)[0] for x in (predicted, x_0))
            single.append((sdf - target).abs().sum() / 512)
    torch.testing.assert_close(value, 2.0 * sum(single) / len(voxels))
    assert loss.of(x_0, x_0, voxels, ~surplus, chosen, places) == 0
    assert loss.of(predicted, x_0, voxels, ~surplus, ~chosen & chosen, places) == 0
