"""The latent DiT of each ablation: its initial state, samples apart, recomputation, precision, old model folders."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.storage.dataclass_values import from_dict
from tests.networks.test_dit import LATENT, learn, make_tokens, randomize
from tests.support.random_voxels import random_voxels

POINTWISE = dataclasses.replace(LATENT, compression_block=8, pooled_conv=False)
FORMS = {
    "window": {"branches": ("window",)},
    "compression": {"branches": ("compression", "window")},
    "no_window": {"branches": ("compression", "selection")},
    "full": {"attention": "full", "packing_channels": 8},
    "packed": {"packing_channels": 8},
    "sequence": {"attention": "sequence"},
    "all_patches": {"sparse_context": False},
}
ALL = pytest.mark.parametrize("form", FORMS)


def problem(form):
    torch.manual_seed(0)
    voxels = random_voxels([60, 30], 16)
    model = LatentDiT(dataclasses.replace(POINTWISE, **FORMS[form]))
    return model, (torch.randn(len(voxels), 4), torch.tensor([0.3, 0.9]), voxels, make_tokens())


@ALL
def test_starts_at_zero_velocity_and_learns(form):
    model, (x_t, *rest) = problem(form)
    assert model(x_t, *rest).eq(0).all()
    first, last = learn(model, x_t, *rest, steps=8)
    assert last < 0.93 * first


@ALL
def test_samples_do_not_see_each_other(form):
    model, (x_t, t, voxels, tokens) = problem(form)
    out = randomize(model)(x_t, t, voxels, tokens)
    for i, (rows, expected) in enumerate(zip(x_t.split(voxels.counts), out.split(voxels.counts), strict=True)):
        alone = model(rows, t[i : i + 1], voxels.sample(i), tokens.sample(i))
        torch.testing.assert_close(alone, expected, atol=1e-3, rtol=1e-3)


@ALL
def test_gradient_checkpointing_changes_nothing(form):
    model, arguments = problem(form)
    randomize(model)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*arguments).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


@ALL
def test_half_precision(form):
    model, arguments = problem(form)
    expected = randomize(model)(*arguments)
    out = model.bfloat16()(*arguments)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).square().mean().sqrt() < 0.2 * expected.square().mean().sqrt()


def test_full_attention_sees_an_eighth_of_the_tokens():
    model, (x_t, t, voxels, tokens) = problem("full")
    seen = []
    model.blocks[0].register_forward_hook(lambda block, inputs, out: seen.append(len(out)))
    assert len(model(x_t, t, voxels, tokens)) == len(voxels)
    assert seen == [len(voxels.coarsen(2)[0])]


def test_old_settings_give_the_model_of_today():
    """config.json of a model made before the ablations loads, and its weights have the names they had."""
    settings = json.loads((Path(__file__).parents[2] / "d3ds2/weights/tiny/config.json").read_text())
    config = from_dict(LatentDiTConfig, settings["networks"]["latent_dit"])
    assert config.branches == ("compression", "selection", "window")
    assert config.attention == "spatial" and config.packing_channels == 0
    assert from_dict(LatentDiTConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "change",
    [
        {"branches": ("selection", "window")},
        {"branches": ()},
        {"attention": "sequence", "compression_block": 2},
        {"packing_channels": -1},
    ],
)
def test_wrong_configs_are_named(change):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(POINTWISE, **change)
