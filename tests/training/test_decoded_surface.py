"""The loss of what latents of the latent DiT decode to, on structures with surplus and missing blocks."""

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from training.decoded_surface import DecodedSurface, side_of_free, slope_error
from training.losses import SurfaceLossConfig, sign_divergence

G = 12


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return SDFVAE(SDFVAEConfig(4, 64, 4, 1, 1, 8, 2, 64, True)).requires_grad_(False)


def structures():
    """Two structures (2, G, G, G): a closed box, and a long corridor between walls that winds through the grid."""
    occupied = torch.zeros(2, G, G, G, dtype=torch.bool)
    occupied[0, 2:9, 2:9, 2:9] = True
    occupied[0, 3:8, 3:8, 3:8] = False
    occupied[1, :, :, 0] = occupied[1, :, :, 2] = occupied[1, 0] = occupied[1, -1] = True
    occupied[1, :, 0], occupied[1, :, -1] = True, True
    for wall in range(2, G - 2, 2):
        occupied[1, wall, 1:-1, 1] = True
        occupied[1, wall, 1 if wall % 4 else -2, 1] = False
    occupied[1, 1, 1, 2] = False  # the way in
    return occupied


def test_free_blocks_are_inside_where_no_way_leads_out():
    occupied = structures()
    side = side_of_free(occupied)
    assert torch.equal(side == 0, occupied)
    assert (side[0, 3:8, 3:8, 3:8] == -1).all() and (side[0, 9:] == 1).all()
    assert (side[1] >= 0).all()  # also at the end of the corridor
    occupied[1, 1, 1, 2] = True
    assert (side_of_free(occupied)[1, 1:-1, 1:-1, 1] <= 0).all()


def case():
    """Tokens of two samples, some surplus: voxels, which have a surface, their x_0 and a prediction, and the truth."""
    torch.manual_seed(1)
    occupied = structures()
    chosen = (occupied & (torch.rand(occupied.shape) > 0.2)) | (torch.rand(occupied.shape) < 0.1)
    voxels, _ = Voxels.sort(chosen.nonzero(), G, 2)
    has_surface = occupied[tuple(voxels.coords.long().t())]
    assert has_surface.any() and not has_surface.all()
    x_0 = torch.randn(len(voxels), 4) * 0.3
    return voxels, has_surface, x_0, (x_0 + 0.5 * torch.randn_like(x_0)).requires_grad_(), occupied


def test_surplus_blocks_are_decoded_and_should_be_empty(vae):
    voxels, has_surface, x_0, predicted, occupied = case()
    loss = DecodedSurface(vae, SurfaceLossConfig(weight=2.0, sign=0.3, surplus=True))
    chosen = torch.tensor([True, True])
    value = loss.of(predicted, x_0, voxels, has_surface, chosen, occupied)
    value.backward()
    assert (predicted.grad.abs().sum(1) > 0).all()

    sdf, fine = vae.decode(vae.denormalize_latents(predicted), voxels)
    true = Voxels(voxels.coords[has_surface], G, 2)
    of_true, fine_true = vae.decode(vae.denormalize_latents(x_0[has_surface]), true)
    wanted = {tuple(at): s for at, s in zip(fine_true.coords.tolist(), of_true[:, 0], strict=True)}
    side = side_of_free(occupied)
    target = torch.stack(
        [
            wanted[at] if at in wanted else side[at[0], at[1] // 8, at[2] // 8, at[3] // 8]
            for at in map(tuple, fine.coords.tolist())
        ]
    )
    errors = (sdf[:, 0] - target).abs() + 0.3 * sign_divergence(sdf[:, 0], target)
    torch.testing.assert_close(value, 2.0 * errors.mean())


def test_loss_counts_chosen_samples_alone(vae):
    voxels, has_surface, x_0, predicted, occupied = case()
    for surplus in (False, True):
        loss = DecodedSurface(vae, SurfaceLossConfig(surplus=surplus))
        both, first, second, none = (
            loss.of(predicted, x_0, voxels, has_surface, torch.tensor(chosen), occupied)
            for chosen in ([True, True], [True, False], [False, True], [False, False])
        )
        torch.testing.assert_close(both, first + second)
        assert none == 0 and first > 0 and second > 0
    assert (
        DecodedSurface(vae, SurfaceLossConfig()).of(x_0, x_0, voxels, has_surface, torch.tensor([True, True]), occupied)
        == 0
    )


def test_structures_without_a_true_block_can_be_decoded(vae):
    """A prediction may miss the whole shape."""
    occupied = torch.zeros(1, G, G, G, dtype=torch.bool)
    occupied[0, 0, 0, 0] = True
    voxels = Voxels(torch.tensor([[0, 5, 5, 5], [0, 5, 5, 6]], dtype=torch.int32), G, 1)
    has_surface, x_0 = torch.zeros(2, dtype=torch.bool), torch.zeros(2, 4)
    predicted = torch.randn(2, 4, requires_grad=True)
    loss = DecodedSurface(vae, SurfaceLossConfig(surplus=True))
    loss.of(predicted, x_0, voxels, has_surface, torch.tensor([True]), occupied).backward()
    assert predicted.grad.abs().sum() > 0


def test_slope_errors_are_those_of_ripples_and_not_of_offsets(vae):
    ramp = torch.arange(8.0)[:, None, None].expand(2, 8, 8, 8).reshape(2, 512)
    assert slope_error(ramp) == 1 and slope_error(ramp + 3) == 1
    assert slope_error(torch.full((2, 512), 3.0)) == 0
    voxels, has_surface, x_0, predicted, occupied = case()
    both = torch.tensor([True, True])
    values = [
        DecodedSurface(vae, SurfaceLossConfig(weight=2.0, slope=slope)).of(
            predicted, x_0, voxels, has_surface, both, occupied
        )
        for slope in (0.0, 1.0, 3.0)
    ]
    assert values[1] > values[0]
    torch.testing.assert_close(values[2] - values[0], 3 * (values[1] - values[0]))


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"expected surface\.sign and slope >= 0, got -1 and 0"):
        SurfaceLossConfig(sign=-1)
