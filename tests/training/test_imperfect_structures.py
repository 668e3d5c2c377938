"""Imperfect structures: how many blocks come and go, where they lie, and that each token knows what it was."""

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from training.data.imperfect_structures import (
    MOST_MISSING,
    MOST_SURPLUS,
    drawer,
    on_structures,
    predicted_structures,
    random_structures,
    rows_of,
)
from training.losses import FlowLossConfig, draw_all
from training.train_dit import ChangedStructures, flow_loss

G = 16


def shells(number: int) -> Voxels:
    """Return the surfaces of `number` balls of different sizes."""
    place = torch.stack(torch.meshgrid(*[torch.arange(G) - G / 2 + 0.5] * 3, indexing="ij"))
    distance = place.norm(dim=0)
    samples = torch.stack([(distance - 3 - 3 * i / number).abs() < 0.9 for i in range(number)])
    return Voxels.sort(samples.nonzero(), G, number)[0]


def draw_of(number: int, seed: int, draw_samples=draw_all):
    return drawer(number, torch.Generator().manual_seed(seed), draw_samples, torch.device("cpu"))


@pytest.fixture(scope="module")
def voxels():
    return shells(60)


@pytest.fixture(scope="module")
def other(voxels):
    return on_structures(voxels, random_structures(rows_of(voxels) >= 0, draw_of(60, 0)))


def test_kept_tokens_know_their_rows(voxels, other):
    kept = other.rows >= 0
    assert torch.equal(other.voxels.coords[kept], voxels.coords[other.rows[kept]])
    true = {tuple(row) for row in voxels.coords.tolist()}
    assert not any(tuple(row) in true for row in other.voxels.coords[~kept].tolist())
    Voxels(other.voxels.coords, G, 60)  # sorted, without repeats


def test_surplus_tokens_lie_beside_the_structure(voxels, other):
    own, true = other.voxels.coords[other.rows < 0].float(), voxels.coords.float()
    own, true = own * torch.tensor([100, 1, 1, 1]), true * torch.tensor([100, 1, 1, 1])
    nearest = torch.cdist(own, true, p=torch.inf).amin(1)
    assert set(nearest.tolist()) == {1.0, 2.0}
    assert (nearest == 1).float().mean() > 0.6


def test_numbers_of_blocks(voxels, other):
    true, is_surplus = torch.tensor(voxels.counts), other.rows < 0
    surplus = torch.bincount(other.voxels.batch_index[is_surplus], minlength=60)
    missing = true - torch.bincount(other.voxels.batch_index[~is_surplus], minlength=60)
    assert (surplus <= MOST_SURPLUS * true).all() and surplus.max() > 0.8 * MOST_SURPLUS * true[surplus.argmax()]
    assert (missing <= MOST_MISSING * true).all() and (missing > 0).float().mean() > 0.25
    untouched = (surplus == 0) & (missing == 0)
    assert 0.1 < untouched.float().mean() < 0.35


def test_changes_are_a_function_of_the_generator_and_of_the_row():
    occupied = rows_of(shells(4)) >= 0
    whole = random_structures(occupied, draw_of(4, 2))
    assert torch.equal(whole, random_structures(occupied, draw_of(4, 2)))
    part = random_structures(occupied[[1, 3]], draw_of(2, 2, lambda _, make: make(4)[[1, 3]]))
    assert torch.equal(part, whole[[1, 3]])


def test_an_empty_structure_leaves_the_true_one():
    voxels = shells(3)
    occupied = rows_of(voxels) >= 0
    occupied[1] = False
    other = on_structures(voxels, occupied)
    assert torch.equal(other.voxels.coords, voxels.coords) and torch.equal(other.rows, torch.arange(len(voxels)))


class Knows(torch.nn.Module):
    """A structure DiT that knows the latents."""

    def __init__(self, x_0):
        super().__init__()
        self.x_0 = x_0
        self.config = type("Config", (), {"latent_channels": x_0.shape[1], "resolution": x_0.shape[2]})

    def forward(self, x_t, t, image_tokens):
        assert (t == 1).all()
        return x_t - self.x_0


def test_predicted_structures_are_those_of_the_latents():
    torch.manual_seed(0)
    vae = StructureVAE(StructureVAEConfig(2, (8, 8, 8), (8, 8, 8), *[1] * 4))
    x_0 = torch.randn(40, 2, 4, 4, 4)
    tokens = ImageTokens(torch.zeros(40, 1), torch.zeros(40, 4), torch.ones(40) > 0, 40)
    made = predicted_structures(Knows(x_0), vae, tokens, (0.03, 0.4), 0.5, draw_of(40, 0))
    with torch.no_grad():
        probability = vae.decode(vae.denormalize_latents(x_0))[:, 0].sigmoid()
    assert made.shape == probability.shape
    assert made[probability >= 0.4].all()
    lowest = torch.where(made, probability, 1).flatten(1).amin(1)
    assert lowest.min() < 0.2 and (made.flatten(1).sum(1).float().std() > 0)
    halves = predicted_structures(Knows(x_0), vae, tokens, (0.5, 0.5), 0.5, draw_of(40, 0))
    is_exact = (halves == (probability >= 0.5)).flatten(1).all(1)
    assert 0.2 < is_exact.float().mean() < 0.8  # the others are wider
    assert halves[probability >= 0.5].all()


def knowing_noise(seen):
    """Return a network whose velocity is zero, and which notes what it gets."""

    def model(x_t, t, voxels, tokens):
        seen.append((x_t, t, voxels))
        return torch.zeros_like(x_t)

    return model


class Tokens:
    def where(self, keep):
        return self


@pytest.mark.parametrize("kind", ["true", "random", "predicted"])
def test_loss_on_other_structures_counts_every_token(kind):
    """At t = 1 the network sees the noise alone, so the loss follows from it and from what the latents should be."""
    voxels, seen = shells(2), []
    x_0, loss = torch.zeros(len(voxels), 4), FlowLossConfig(noise_alone=1.0)
    everywhere = torch.ones(2, G, G, G, dtype=torch.bool)
    structures = {
        "true": None,
        "random": ChangedStructures(2.0, True, 0.0, None),
        "predicted": ChangedStructures(2.0, True, 1.0, lambda draw: everywhere),
    }[kind]
    generator = torch.Generator().manual_seed(4)
    value = flow_loss(knowing_noise(seen), Tokens(), x_0, voxels, loss, generator, structures=structures)
    noise, _, other = seen[0]
    true = {tuple(row) for row in voxels.coords.tolist()}
    added = torch.tensor([tuple(row) not in true for row in other.coords.tolist()])
    assert added.any() == (kind != "true") and (kind != "predicted" or len(other) == 2 * G**3)
    expected = (noise - 2.0 * added[:, None]).square().mean() * (len(other) / len(voxels))
    torch.testing.assert_close(value, expected)
    assert len({*noise.flatten().tolist()}) > 0.999 * noise.numel()  # every token has its own noise
