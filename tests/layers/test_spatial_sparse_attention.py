"""Spatial sparse attention where no parity file tests it: packing, odd batches, precision, gradients."""

import math

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention
from tests.support.random_voxels import random_voxels

FORMS = [pytest.param(4, True, id="pooled-conv-4"), pytest.param(8, False, id="pointwise-8"), (2, False)]


def make_module(c=4, pooled_conv=True, top_k=2, shift=4, hidden_size=32):
    torch.manual_seed(1)
    module = SpatialSparseAttention(hidden_size, 4, 2, c, pooled_conv, top_k, shift=shift)
    torch.nn.init.normal_(module.block_position)
    return module


@pytest.mark.parametrize(("c", "pooled_conv"), FORMS)
def test_samples_do_not_see_each_other(c, pooled_conv):
    module, voxels = make_module(c, pooled_conv), random_voxels([60, 0, 45], 16)
    x = torch.randn(len(voxels), 32)
    out = module(x, voxels)
    alone = [module(rows, voxels.sample(i)) for i, rows in enumerate(x.split(voxels.counts))]
    torch.testing.assert_close(out, torch.cat(alone))


@pytest.mark.parametrize(("c", "pooled_conv"), FORMS)
@pytest.mark.parametrize("counts", [[0], [1], [0, 2], [0, 0]])
def test_tiny_batches(c, pooled_conv, counts):
    module, voxels = make_module(c, pooled_conv), random_voxels(counts, 16)
    x = torch.randn(len(voxels), 32, requires_grad=True)
    out = module(x, voxels)
    out.square().sum().backward()
    assert out.shape == x.shape and out.isfinite().all() and x.grad.isfinite().all()


def test_every_compression_block_holds_one_token():
    coords = torch.tensor([[0, x, y, 0] for x in (0, 8) for y in (0, 4, 8)])
    voxels = Voxels.sort(coords, 16)[0]
    assert len(voxels.coarsen(4)[0]) == len(voxels)
    assert make_module()(torch.randn(len(voxels), 32), voxels).isfinite().all()


def test_all_branches_over_everything_are_full_attention():
    """With one window, all blocks selected and gates of one half, two branches each give half of full attention."""
    module, voxels = make_module(c=1, pooled_conv=False, top_k=8, shift=0), random_voxels([40], 8)
    for compress in (module.compress_k, module.compress_v):
        torch.nn.init.zeros_(compress.pointwise.weight)  # SiLU(0) = 0: the compression branch adds nothing
        torch.nn.init.zeros_(compress.pointwise.bias)
    torch.nn.init.zeros_(module.gate.weight)
    x = torch.randn(len(voxels), 32)
    q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(0, 1) for layer in (module.to_q, module.to_k, module.to_v))
    full = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    ).transpose(0, 1)
    torch.testing.assert_close(module(x, voxels), module.to_out(full.flatten(1)))


def test_the_number_of_selected_blocks_matters():
    """Selecting one block per query gives another result than selecting all of them."""
    module, voxels = make_module(c=8, pooled_conv=False, top_k=1, shift=0), random_voxels([200], 16)
    x = torch.randn(len(voxels), 32)
    few, many = module(x, voxels), make_module(c=8, pooled_conv=False, top_k=8, shift=0)(x, voxels)
    assert not torch.allclose(few, many, atol=1e-3)


def test_gradients_in_double_precision():
    module, voxels = make_module(c=4, pooled_conv=True).double(), random_voxels([12, 9], 16)
    x = torch.randn(len(voxels), 32, dtype=torch.float64)
    direction = torch.randn_like(x)

    def loss(step):
        return module(x + step * direction, voxels).square().sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        numeric = (loss(torch.tensor(1e-6)) - loss(torch.tensor(-1e-6))) / 2e-6
    assert math.isclose(slope.item(), numeric.item(), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module, voxels = make_module(), random_voxels([60, 45], 16)
    x = torch.randn(len(voxels), 32)
    expected = module(x, voxels)
    out = module.to(dtype)(x.to(dtype), voxels)
    assert out.dtype == dtype
    difference = (out.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert difference < 0.1  # rounding may change the order of close block scores


def test_autocast():
    module, voxels = make_module(), random_voxels([60, 45], 16)
    x = torch.randn(len(voxels), 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, voxels)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param((32, 4, 3, 4, True, 8), "divides num_heads", id="kv-heads"),
        pytest.param((32, 4, 2, 3, True, 8), "divides 8", id="compression-block"),
    ],
)
def test_wrong_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        SpatialSparseAttention(*sizes)
