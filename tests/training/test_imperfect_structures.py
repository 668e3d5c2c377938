"""Imperfect structures: how many blocks come and go, where they lie, and that each token knows what it was."""

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from training.data.imperfect_structures import MOST_MISSING, make_imperfect
from training.losses import FlowLossConfig
from training.train_dit import flow_loss

G = 16


def shells(number: int) -> Voxels:
    """Return the surfaces of `number` balls of different sizes."""
    place = torch.stack(torch.meshgrid(*[torch.arange(G) - G / 2 + 0.5] * 3, indexing="ij"))
    distance = place.norm(dim=0)
    samples = torch.stack([(distance - 3 - 3 * i / number).abs() < 0.9 for i in range(number)])
    return Voxels.sort(samples.nonzero(), G, number)[0]


@pytest.fixture(scope="module")
def voxels():
    return shells(60)


@pytest.fixture(scope="module")
def changed(voxels):
    return make_imperfect(voxels, torch.Generator().manual_seed(0))


def test_kept_tokens_know_their_rows(voxels, changed):
    kept = ~changed.is_surplus
    assert torch.equal(changed.voxels.coords[kept], voxels.coords[changed.rows[kept]])
    Voxels(changed.voxels.coords, G, 60)  # sorted, without repeats


def test_surplus_tokens_have_rows_of_their_own_in_their_sample(voxels, changed):
    rows, sample = changed.rows[changed.is_surplus], changed.voxels.batch_index[changed.is_surplus]
    assert len(rows.unique()) == len(rows)
    assert torch.equal(voxels.batch_index[rows], sample)


def test_surplus_tokens_lie_beside_the_structure(voxels, changed):
    own, true = changed.voxels.coords[changed.is_surplus].float(), voxels.coords.float()
    own, true = own * torch.tensor([100, 1, 1, 1]), true * torch.tensor([100, 1, 1, 1])
    nearest = torch.cdist(own, true, p=torch.inf).amin(1)
    assert set(nearest.tolist()) == {1.0, 2.0}
    assert (nearest == 1).float().mean() > 0.6


def test_numbers_of_blocks(voxels, changed):
    true = torch.tensor(voxels.counts)
    surplus = torch.bincount(changed.voxels.batch_index[changed.is_surplus], minlength=60)
    missing = true - torch.bincount(changed.voxels.batch_index[~changed.is_surplus], minlength=60)
    assert (surplus <= true).all() and surplus.max() > 0.8 * true[surplus.argmax()]
    assert (missing <= MOST_MISSING * true).all() and (missing > 0).float().mean() > 0.25
    untouched = (surplus == 0) & (missing == 0)
    assert 0.1 < untouched.float().mean() < 0.35


def test_changes_are_a_function_of_the_generator_and_of_the_row():
    voxels = shells(4)

    def part(_, make):
        return make(4)[[1, 3]]

    whole = make_imperfect(voxels, torch.Generator().manual_seed(2))
    again = make_imperfect(voxels, torch.Generator().manual_seed(2))
    assert torch.equal(whole.voxels.coords, again.voxels.coords)
    own = Voxels.cat([voxels.sample(1), voxels.sample(3)])
    rows = make_imperfect(own, torch.Generator().manual_seed(2), part)
    expected = Voxels.cat([whole.voxels.sample(1), whole.voxels.sample(3)])
    assert torch.equal(rows.voxels.coords, expected.coords)


@pytest.mark.parametrize("surplus", [False, True])
def test_loss_of_imperfect_structures_counts_every_token(surplus):
    """A network that knows x_0 and the noise has no loss on any token, so what is added has the stated value."""
    coords = torch.cartesian_prod(torch.arange(2), torch.arange(3, 7), torch.arange(3, 7), torch.arange(3, 5))
    voxels = Voxels.sort(coords, 16, 2)[0]
    x_0, seen = torch.zeros(len(voxels), 4), []

    def model(x_t, t, voxels, tokens):
        seen.append((x_t, t, voxels))
        return torch.zeros_like(x_t)

    class Tokens:
        def where(self, keep):
            return self

    loss = FlowLossConfig(noise_alone=1.0)  # x_t is the noise
    value = flow_loss(
        model, Tokens(), x_0, voxels, loss, torch.Generator().manual_seed(4), surplus_value=2.0 if surplus else None
    )
    noise, _, changed = seen[0]
    true = {tuple(row) for row in voxels.coords.tolist()}
    added = torch.tensor([tuple(row) not in true for row in changed.coords.tolist()])
    assert added.any() == surplus
    expected = (noise - 2.0 * added[:, None]).square().mean() * (len(changed) / len(voxels))
    torch.testing.assert_close(value, expected)
    assert len({*noise.flatten().tolist()}) == noise.numel()  # every token has its own noise
