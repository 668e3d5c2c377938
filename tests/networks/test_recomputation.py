"""Blocks of the latent DiT that are computed twice, with Triton's kernels and without them."""

from collections import Counter

import pytest
import torch

from d3ds2.kernels import linear, modulation, packed_attention, spatial_sparse_attention
from d3ds2.kernels.attention_tiles import AttentionTiles, Tile
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.kept import Kept, computed
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
FORMS = {"nothing": (False, False), "cheap": (True, False), "all": (True, True)}  # what is computed twice


@pytest.fixture
def launches(monkeypatch):
    """Take the kernels on any device, and count the forward passes of attention."""
    from d3ds2.kernels import packed_attention_triton, selection_attention_triton, spatial_sparse_attention_triton

    counts = Counter()

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (counts.update([name]), original(*args, **kwargs))[1])

    for module in (spatial_sparse_attention_triton, packed_attention_triton):
        counted(module, "ragged_attention_forward")
    counted(spatial_sparse_attention_triton, "select_blocks_triton")
    small = AttentionTiles(forward=Tile(16, 16), dq=Tile(16, 16), dkdv=Tile(16, 16))  # few steps for the interpreter
    for module, name in ((spatial_sparse_attention_triton, "FP32"), (selection_attention_triton, "FP32")):
        monkeypatch.setattr(module, name, small)
    monkeypatch.setattr(packed_attention_triton, "TILES", small)
    monkeypatch.setattr(packed_attention_triton, "MAX_SPLITS", 1)
    monkeypatch.setattr(spatial_sparse_attention, "on_triton", lambda x: True)
    monkeypatch.setattr(packed_attention, "_kernel_is_best", lambda q: True)
    for module in (linear, modulation):
        monkeypatch.setattr(module, "half_on_triton", lambda x: True)
    monkeypatch.setattr(linear, "MANY_ROWS", 0)
    return counts


def make_model(depth: int = 1) -> tuple[LatentDiT, tuple]:
    config = LatentDiTConfig(
        hidden_size=32,
        depth=depth,
        num_heads=1,
        num_kv_heads=1,
        context_size=12,
        compression_block=8,
        pooled_conv=False,
        sparse_context=False,
        top_k=2,
    )
    model = LatentDiT(config).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    voxels = random_voxels([7, 3], 16).to(DEVICE)
    coords = torch.tensor([[b, 0, 0, 1] for b in (0, 0, 1)], dtype=torch.int32, device=DEVICE)
    tokens = ImageTokens(torch.randn(3, 12, device=DEVICE), coords, torch.ones(3, dtype=torch.bool, device=DEVICE), 2)
    return model, (torch.randn(len(voxels), 16, device=DEVICE), torch.rand(2, device=DEVICE), voxels, tokens)


def gradients(model: LatentDiT, inputs: tuple, form: str) -> list[torch.Tensor]:
    model.gradient_checkpointing, model.recompute_all = FORMS[form]
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.long  # the interpreter takes a minute for the backward passes
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_attention_runs_once_unless_all_is_recomputed(launches):
    model, inputs = make_model()
    found, counts = {}, {}
    for form in FORMS:
        launches.clear()
        found[form], counts[form] = gradients(model, inputs, form), dict(launches)
    assert counts["nothing"] == counts["cheap"] == {"ragged_attention_forward": 3, "select_blocks_triton": 1}
    assert counts["all"] == {"ragged_attention_forward": 6, "select_blocks_triton": 2}
    for form in ("cheap", "all"):
        for a, b in zip(found[form], found["nothing"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_without_triton_all_is_recomputed():
    model, inputs = make_model(depth=2)
    found = [gradients(model, inputs, form) for form in FORMS]
    for others in zip(*found, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])


def test_later_passes_take_what_the_first_one_kept():
    kept, made = Kept(), []

    def block(x):
        (double,) = computed(kept, lambda: made.append(1) or [2 * x])
        (triple,) = computed(kept, lambda: made.append(1) or [3 * x])
        return double, triple

    x = torch.ones(2)
    first_pass, later_pass = kept.contexts()
    with first_pass:
        first = block(x)
    with later_pass:
        again = block(x)
    with kept.contexts()[1]:  # a graph that is kept is run backward once more
        block(x)
    assert len(made) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert computed(None, lambda: [x])[0] is x
