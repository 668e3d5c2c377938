"""Several structures of one image: their seeds, their order in the batch, and their mean."""

import dataclasses

import pytest
import torch

from d3ds2.pipeline import build_pipeline
from d3ds2.structure_samples import mean_logits, seeds_of
from tests.support.tiny_model import SAMPLING, draw_object, make_networks


@pytest.fixture(scope="module")
def networks():
    return make_networks()


def test_seeds_differ_and_begin_with_the_own():
    seeds = [0, 1, 7, 2**64 - 1]
    made = seeds_of(seeds, 8)
    assert made[:4] == seeds and len({*made}) == 32 and all(0 <= seed < 2**64 for seed in made)
    assert seeds_of(seeds, 1) == seeds
    assert [made[4 * k + 2] for k in range(8)] == seeds_of([7], 8)


def test_probabilities_are_averaged():
    logits = torch.randn(6, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = mean_logits(logits, 3).sigmoid()
    torch.testing.assert_close(mean, (logits[:2].sigmoid() + logits[2:4].sigmoid() + logits[4:].sigmoid()) / 3)
    assert mean_logits(logits, 1) is logits


def test_a_structure_is_the_mean_of_its_samples(networks):
    pipeline = build_pipeline(networks, dataclasses.replace(SAMPLING, structure_samples=3))
    single = build_pipeline(networks, SAMPLING)
    tokens = pipeline.encode_image([draw_object(), draw_object()])
    seeds, shown, alone = [3, 5], [], []
    voxels = pipeline.sample_structure(tokens, seeds, 2, on_step=lambda step, x_t, x_0: shown.append(x_0))
    for seed in seeds_of(seeds, 3):
        single.sample_structure(tokens.sample(0), [seed], 2, on_step=lambda step, x_t, x_0: alone.append(x_0))
    torch.testing.assert_close(shown[-1], torch.cat(alone[1::2]), rtol=1e-4, atol=1e-4)
    vae = pipeline.structure_vae
    logits = vae.decode(vae.denormalize_latents(shown[-1]))
    expected = logits.sigmoid().unflatten(0, (3, 2)).mean(0)[:, 0] >= vae.config.threshold
    assert voxels.batch_size == 2 and 0 < len(voxels) < expected.numel()
    grid = torch.zeros_like(expected)
    grid[tuple(voxels.coords.long().t())] = True
    assert torch.equal(grid, expected)
