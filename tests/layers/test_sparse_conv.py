"""Outputs and gradients of sparse layers against dense layers, on a volume that is zero except at the voxels."""

import pytest
import torch
from torch.nn import functional as F

from d3ds2.kernels import gather_conv, gather_conv_chunks, group_norm
from d3ds2.layers.sparse_conv import PackedGroupNorm, SubdivideConv3d, SubmanifoldConv3d, mean_pool, side_by_side
from tests.networks.test_activation_memory import peak
from tests.support.random_voxels import random_voxels

CASES = [
    pytest.param([70, 0, 33], 5, id="empty-sample-between"),
    pytest.param([1], 3, id="one-voxel"),
    pytest.param([729], 9, id="full-grid"),
    pytest.param([200, 311], 17, id="three-blocks-per-edge"),
    pytest.param([0, 0], 8, id="no-voxel"),
]


def to_dense(x, voxels):
    """(N, C) -> (B, C, R, R, R), zero except at the voxels."""
    index = tuple(voxels.coords.long().t())
    dense = x.new_zeros(voxels.batch_size, *[voxels.resolution] * 3, x.shape[1]).index_put(index, x)
    return dense.movedim(-1, 1)


def to_rows(dense, voxels):
    return dense.movedim(1, -1)[tuple(voxels.coords.long().t())]


def dense_weight(conv):
    return conv.weight.unflatten(0, (3, 3, 3)).permute(4, 3, 0, 1, 2)  # (O, I, x, y, z)


def outputs_and_gradients(function, *inputs):
    out = function()
    torch.manual_seed(1)
    return out, *torch.autograd.grad(out, inputs, torch.randn_like(out))


def assert_all_close(actual, expected, **tolerance):
    for name, a, e in zip(("out", "dx", "dweight", "dbias"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize(("counts", "resolution"), CASES)
@pytest.mark.parametrize("channels", [(3, 5), (16, 8)])
def test_convolution_is_dense_convolution(counts, resolution, channels):
    voxels = random_voxels(counts, resolution)
    conv = SubmanifoldConv3d(*channels).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(len(voxels), channels[0], dtype=torch.float64, requires_grad=True)

    def dense():
        return to_rows(F.conv3d(to_dense(x, voxels), dense_weight(conv), conv.bias, padding=1), voxels)

    inputs = (x, conv.weight, conv.bias)
    assert_all_close(outputs_and_gradients(lambda: conv(x, voxels), *inputs), outputs_and_gradients(dense, *inputs))


@pytest.mark.parametrize(("counts", "resolution"), CASES)
def test_subdivided_convolution_is_convolution_of_the_children(counts, resolution):
    voxels = random_voxels(counts, resolution)
    fine, parent = voxels.subdivide()
    conv = SubdivideConv3d(3, 5).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(len(voxels), 3, dtype=torch.float64, requires_grad=True)

    def direct():
        return SubmanifoldConv3d.forward(conv, x[parent], fine)

    inputs = (x, conv.weight, conv.bias)
    actual = outputs_and_gradients(lambda: conv(x, voxels)[voxels.child_order], *inputs)
    assert_all_close(actual, outputs_and_gradients(direct, *inputs))


def test_place_adds_a_linear_layer_for_each_child():
    voxels = random_voxels([70, 0, 333], 16)
    assert SubdivideConv3d(3, 5, place=True).half().dense_weights().dtype == torch.float16
    conv = SubdivideConv3d(3, 5, place=True).double()
    x = torch.randn(len(voxels), 3, dtype=torch.float64, requires_grad=True)
    plain = conv(x, voxels)
    torch.nn.init.normal_(conv.place)
    children = torch.einsum("ni,cio->nco", x, conv.place).flatten(0, 1)
    torch.testing.assert_close(conv(x, voxels), plain + children)
    inputs = (x, conv.weight, conv.place)
    actual = outputs_and_gradients(lambda: conv(x, voxels), *inputs)
    neighbors = voxels.neighbors
    again = gather_conv.gather_conv(x.detach(), neighbors, conv.dense_weights().detach(), conv.bias.detach())
    torch.testing.assert_close(actual[0], again)
    expected = torch.autograd.grad(torch.einsum("ni,cio->nco", x, conv.place).flatten(0, 1).sum(), conv.place)
    torch.testing.assert_close(torch.autograd.grad(conv(x, voxels).sum(), conv.place), expected)


def test_side_by_side_puts_every_child_in_its_place():
    voxels = random_voxels([70, 0, 333], 16)
    x = torch.randn(len(voxels), 3, dtype=torch.float64, requires_grad=True)
    rows, coarse = side_by_side(x, voxels), voxels.coarsen(2)[0]
    dense = to_dense(x, voxels)  # (B, 3, R, R, R)
    b, i, j, k = coarse.coords.long().unbind(1)
    children = [dense[b, :, 2 * i + di, 2 * j + dj, 2 * k + dk] for di in (0, 1) for dj in (0, 1) for dk in (0, 1)]
    torch.testing.assert_close(rows, torch.cat(children, dim=1))
    assert torch.autograd.gradcheck(lambda x: side_by_side(x, voxels), x, fast_mode=True)


@pytest.mark.parametrize("layer", [SubmanifoldConv3d, SubdivideConv3d])
def test_convolution_gradcheck(layer):
    voxels = random_voxels([5, 0, 3], 4)
    conv = layer(2, 3).double()
    x = torch.randn(len(voxels), 2, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x, voxels))

    assert torch.autograd.gradcheck(call, (x, conv.weight, conv.bias))


def test_chunks_change_nothing(monkeypatch):
    voxels = random_voxels([300, 211], 9)
    conv = SubmanifoldConv3d(4, 6).double()
    x = torch.randn(len(voxels), 4, dtype=torch.float64, requires_grad=True)
    whole = outputs_and_gradients(lambda: conv(x, voxels), x, conv.weight, conv.bias)
    monkeypatch.setattr(gather_conv_chunks, "CPU_GATHER_BYTES", 1)
    monkeypatch.setattr(gather_conv_chunks, "MIN_ROWS", 100)
    assert len(list(gather_conv_chunks.gathered(x.detach(), voxels.neighbors))) == 6
    assert_all_close(outputs_and_gradients(lambda: conv(x, voxels), x, conv.weight, conv.bias), whole)


def test_convolution_is_deterministic():
    voxels = random_voxels([2000], 24)
    conv = SubmanifoldConv3d(16, 16)
    x = torch.randn(len(voxels), 16, requires_grad=True)
    first, second = (outputs_and_gradients(lambda: conv(x, voxels), x, conv.weight, conv.bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layer", [SubmanifoldConv3d, SubdivideConv3d])
def test_autocast_computes_in_half_precision_and_keeps_float_gradients(layer):
    voxels = random_voxels([150, 60], 8)
    conv = layer(8, 8)
    x = torch.randn(len(voxels), 8, requires_grad=True)
    expected = outputs_and_gradients(lambda: conv(x, voxels), x, conv.weight, conv.bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x, voxels)
    assert out.dtype == torch.bfloat16
    torch.manual_seed(1)
    gradients = torch.autograd.grad(out, (x, conv.weight, conv.bias), torch.randn_like(expected[0]).bfloat16())
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    for a, e in zip((out, *gradients), expected, strict=True):
        assert (a.float() - e).abs().max() < 0.02 * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_run_in_half_precision(dtype):
    voxels = random_voxels([150, 60], 8)
    conv, norm = SubmanifoldConv3d(8, 8), PackedGroupNorm(2, 8)
    x = torch.randn(len(voxels), 8)
    expected = mean_pool(norm(conv(x, voxels), voxels), voxels, 2)[0]
    conv, norm = conv.to(dtype), norm.to(dtype)
    actual = mean_pool(norm(conv(x.to(dtype), voxels), voxels), voxels, 2)[0]
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(("counts", "resolution"), CASES)
@pytest.mark.parametrize("slab_bytes", [1, 1000, 1 << 20])
def test_group_norm_is_separate_for_each_sample(counts, resolution, slab_bytes, monkeypatch):
    monkeypatch.setattr(group_norm, "CPU_SLAB_BYTES", slab_bytes)
    voxels = random_voxels(counts, resolution)
    norm = PackedGroupNorm(3, 6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(len(voxels), 6, dtype=torch.float64, requires_grad=True)

    def dense():
        samples = [s for s in x.split(counts) if len(s)]
        normed = [F.group_norm(s.t()[None], 3, norm.weight, norm.bias)[0].t() for s in samples]
        return torch.cat(normed) if normed else x * norm.weight + norm.bias

    inputs = (x, norm.weight, norm.bias)
    assert_all_close(outputs_and_gradients(lambda: norm(x, voxels), *inputs), outputs_and_gradients(dense, *inputs))


def test_group_norm_of_a_large_mean():
    """A one-pass variance in fp32 would lose all precision here."""
    voxels = random_voxels([500], 12)
    x = torch.randn(500, 4)
    norm = PackedGroupNorm(2, 4)
    torch.testing.assert_close(norm(x + 4096.0, voxels), norm(x, voxels), atol=2e-3, rtol=0)


def test_group_norm_makes_no_copy_of_all_rows_in_float32():
    voxels, norm = random_voxels([20_000, 9_000], 32), PackedGroupNorm(2, 64).bfloat16()
    x = torch.randn(len(voxels), 64).bfloat16()
    slabs = 4 * group_norm.CPU_SLAB_BYTES
    assert x.nbytes < peak(lambda: norm(x, voxels, silu=True)) < x.nbytes + slabs < 4 * x.nbytes


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_mean_pool_divides_by_count_plus_one(factor):
    voxels = random_voxels([70, 0, 333], 16)
    x = torch.randn(len(voxels), 3, dtype=torch.float64, requires_grad=True)
    pooled, coarse = mean_pool(x, voxels, factor)
    cells = {}
    for row, (b, *xyz) in zip(x.tolist(), voxels.coords.tolist(), strict=True):
        cells.setdefault((b, *[p // factor for p in xyz]), []).append(row)
    assert {tuple(c) for c in coarse.coords.tolist()} == cells.keys()
    groups = [torch.tensor(cells[tuple(c)], dtype=torch.float64) for c in coarse.coords.tolist()]
    expected = [group.sum(0) / (len(group) + 1) for group in groups]
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert torch.autograd.gradcheck(lambda x: mean_pool(x, voxels, factor)[0], x, fast_mode=True)


def test_wrong_sizes_are_named():
    voxels = random_voxels([4], 4)
    with pytest.raises(ValueError, match=r"expected features \(4, 3\), got \(4, 2\)"):
        SubmanifoldConv3d(3, 5)(torch.zeros(4, 2), voxels)
    with pytest.raises(ValueError, match="expected num_groups that divides 6 channels, got 4"):
        PackedGroupNorm(4, 6)
