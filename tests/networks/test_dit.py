"""Both diffusion transformers where no parity file tests them: initial state, options, batches, errors."""

import dataclasses

import pytest
import torch

from d3ds2.layers.transformer import FeedForward
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from tests.support.random_voxels import random_voxels

LATENT = LatentDiTConfig(
    latent_channels=4, hidden_size=32, depth=2, num_heads=4, num_kv_heads=2, context_size=12, top_k=2
)
STRUCTURE = StructureDiTConfig(resolution=4, latent_channels=3, hidden_size=32, depth=2, num_heads=4, context_size=12)


def make_tokens(counts=(5, 8)):
    batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    coords = torch.cat([batch[:, None], torch.randint(0, 9, (len(batch), 3))], dim=1).int()
    return ImageTokens(torch.randn(len(batch), 12), coords, torch.ones(len(batch), dtype=torch.bool), len(counts))


def problem(kind, **changes):
    """Return a model with random weights, and the arguments of its forward pass."""
    torch.manual_seed(0)
    if kind == "latent":
        model, voxels = LatentDiT(dataclasses.replace(LATENT, **changes)), random_voxels([40, 25], 16)
        arguments = torch.randn(len(voxels), 4), torch.tensor([0.3, 0.9]), voxels, make_tokens()
    else:
        model = StructureDiT(dataclasses.replace(STRUCTURE, **changes))
        arguments = torch.randn(2, 3, 4, 4, 4), torch.tensor([0.3, 0.9]), make_tokens()
    return model, arguments


def randomize(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def learn(model, x_t, *rest, steps):
    """Fit a random target in some steps; return the first loss and the last. All weights must have gradients."""
    target = torch.randn_like(x_t)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(steps):
        loss = (model(x_t, *rest) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "bias" not in name)
    return losses[0], losses[-1]


KINDS = pytest.mark.parametrize("kind", ["latent", "structure"])


@KINDS
@pytest.mark.parametrize("share_modulation", [False, True])
def test_starts_at_zero_velocity_and_learns(kind, share_modulation):
    model, (x_t, *rest) = problem(kind, share_modulation=share_modulation)
    assert model(x_t, *rest).eq(0).all()
    first, last = learn(model, x_t, *rest, steps=15)
    assert last < 0.85 * first


@KINDS
def test_output_depends_on_time_and_condition(kind):
    model, (x_t, t, *geometry, tokens) = problem(kind)
    randomize(model)
    out = model(x_t, t, *geometry, tokens)
    assert not torch.allclose(model(x_t, t + 0.05, *geometry, tokens), out, atol=1e-3)
    assert not torch.allclose(model(x_t, t, *geometry, tokens.zeroed()), out, atol=1e-3)


@pytest.mark.parametrize("sparse_context", [True, False])
def test_latent_samples_do_not_see_each_other(sparse_context):
    model, (x_t, t, voxels, tokens) = problem("latent", sparse_context=sparse_context)
    randomize(model)
    out = model(x_t, t, voxels, tokens)
    for i, (rows, expected) in enumerate(zip(x_t.split(voxels.counts), out.split(voxels.counts), strict=True)):
        torch.testing.assert_close(
            model(rows, t[i : i + 1], voxels.sample(i), tokens.sample(i)), expected, atol=1e-4, rtol=1e-4
        )


def test_structure_samples_do_not_see_each_other():
    model, (x_t, t, tokens) = problem("structure")
    randomize(model)
    out = model(x_t, t, tokens)
    for i in range(2):
        alone = model(x_t[i : i + 1], t[i : i + 1], tokens.sample(i))
        torch.testing.assert_close(alone[0], out[i], atol=1e-4, rtol=1e-4)


def test_place_of_the_image_tokens_matters_only_when_they_are_sparse():
    for sparse_context in (True, False):
        model, (x_t, t, voxels, tokens) = problem("latent", sparse_context=sparse_context)
        randomize(model)
        moved = dataclasses.replace(tokens, coords=tokens.coords + torch.tensor([0, 1, 0, 0], dtype=torch.int32))
        same = torch.allclose(model(x_t, t, voxels, moved), model(x_t, t, voxels, tokens), atol=1e-4)
        assert same != sparse_context


@KINDS
def test_gradient_checkpointing_changes_nothing(kind):
    model, arguments = problem(kind)
    randomize(model)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*arguments).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    model, arguments = problem(kind)
    randomize(model)
    expected = model(*arguments)
    out = model.to(dtype)(*arguments)
    assert out.dtype == dtype
    assert (out.float() - expected).square().mean().sqrt() < 0.15 * expected.square().mean().sqrt()


@KINDS
def test_autocast(kind):
    model, arguments = problem(kind)
    randomize(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*arguments)
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_shared_modulation_saves_parameters():
    def size(model):
        return sum(parameter.numel() for parameter in model.parameters())

    saved = size(LatentDiT(LATENT)) - size(LatentDiT(dataclasses.replace(LATENT, share_modulation=True)))
    projection = 6 * 32 * 32 + 6 * 32
    assert saved == (LATENT.depth - 1) * projection - LATENT.depth * 6 * 32


@pytest.mark.parametrize(
    ("kind", "index", "value", "message"),
    [
        pytest.param("latent", 0, torch.zeros(64, 4), "voxels' latents", id="latents-do-not-fit-voxels"),
        pytest.param("latent", 1, torch.zeros(1), "2 samples", id="one-time-for-two"),
        pytest.param("latent", 3, make_tokens((5,)), "2 samples", id="tokens-of-one"),
        pytest.param("structure", 0, torch.zeros(2, 3, 5, 4, 4), "expected x_t", id="resolution"),
        pytest.param("structure", 1, torch.zeros(3), "2 samples", id="three-times-for-two"),
    ],
)
def test_wrong_inputs_are_named(kind, index, value, message):
    model, arguments = problem(kind)
    arguments = [*arguments[:index], value, *arguments[index + 1 :]]
    with pytest.raises(ValueError, match=message):
        model(*arguments)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LATENT, {"num_heads": 3}),
        (LATENT, {"num_kv_heads": 3}),
        (LATENT, {"selection_block": 4}),
        (LATENT, {"compression_block": 3}),
        (LATENT, {"top_k": 0}),
        (STRUCTURE, {"num_heads": 5}),
        (STRUCTURE, {"depth": 0}),
    ],
)
def test_wrong_configs_are_named(config, change):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(config, **change)


def test_feed_forward_in_slices(monkeypatch):
    monkeypatch.setattr("d3ds2.layers.transformer.SLICE_ROWS", 4)
    layer, x = FeedForward(8), torch.randn(10, 8)
    expected, rows = layer(x), []
    layer.up.register_forward_hook(lambda module, inputs, hidden: rows.append(len(hidden)))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.02)
    assert rows == 3 * [4, 4, 2]
