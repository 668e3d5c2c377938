"""Submanifold convolution without Triton, in chunks and by spconv, against the definition."""

import numpy as np
import pytest
import torch

from d3ds2.kernels import gather_conv, gather_conv_chunks, gather_conv_spconv
from d3ds2.kernels.gather_conv import dense_weight, gather_conv_reference, submanifold_conv
from tests.networks.test_activation_memory import peak
from tests.support.random_voxels import random_voxels

CASES = [(1, 1, 3), (1, 16, 16), (1, 33, 20), (8, 1, 3), (8, 16, 16), (8, 33, 4)]  # children, Cin, Cout


def inputs(children, Cin, Cout, dtype=torch.float64, counts=(150, 0, 211)):
    torch.manual_seed(0)
    voxels = random_voxels(list(counts), 10)
    weight = torch.randn(27 if children == 1 else 64, Cin, Cout, dtype=dtype)
    return torch.randn(len(voxels), Cin, dtype=dtype), voxels.neighbors, weight, torch.randn(Cout, dtype=dtype)


def outputs_and_gradients(function, x, neighbors, weight, bias, children):
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in (x, weight, bias))
    out = function(x, neighbors, weight, bias, children)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)  # exact in any dtype
    return out, *torch.autograd.grad(out, (x, weight, bias), dout)


def by_definition(x, neighbors, weight, bias, children):
    return gather_conv_reference(x, neighbors, dense_weight(weight, children), bias)


def assert_all_close(actual, expected):
    for name, a, e in zip(("out", "dx", "dweight", "dbias"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [50, 10**6])
def test_chunks_are_the_definition(case, rows, monkeypatch):
    monkeypatch.setattr(gather_conv_chunks, "CPU_GATHER_BYTES", 1 if rows == 50 else 1 << 30)
    monkeypatch.setattr(gather_conv_chunks, "MIN_ROWS", rows)
    given = inputs(*case)
    actual = outputs_and_gradients(submanifold_conv, *given, case[0])
    assert_all_close(actual, outputs_and_gradients(by_definition, *given, case[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("children", [1, 8])
def test_chunks_in_half_precision(children, dtype):
    x, neighbors, weight, bias = inputs(children, 16, 8, dtype)
    expected = by_definition(x.float(), neighbors, weight.float(), bias.float(), children)
    actual = submanifold_conv(x, neighbors, weight, bias, children)
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("children", [1, 8])
def test_some_rows_of_the_result(children):
    x, neighbors, weight, bias = inputs(children, 5, 4)
    some = torch.randperm(len(x))[:70]
    weight = dense_weight(weight, children)
    expected = gather_conv_reference(x, neighbors, weight, bias).view(len(x), -1)[some].view(-1, 4)
    torch.testing.assert_close(gather_conv.gather_conv(x, neighbors[:, some], weight, bias), expected)


def test_the_neighbours_of_all_voxels_are_never_gathered(monkeypatch):
    budget = 2 << 20
    monkeypatch.setattr(gather_conv_chunks, "CPU_GATHER_BYTES", budget)
    x, neighbors, weight, bias = inputs(1, 64, 16, torch.float32, counts=(1000,) * 5)
    dout = torch.randn(len(x), 16)
    padded, whole, rest = x.nbytes, 27 * x.nbytes, 10_000
    measured = peak(lambda: submanifold_conv(x, neighbors, weight, bias))
    assert padded + dout.nbytes < measured <= padded + dout.nbytes + budget + rest < whole / 2
    measured = peak(lambda: gather_conv.gather_conv_gradients_chunks(x, neighbors, weight, dout, 1))
    assert measured <= dout.nbytes + x.nbytes + 4 * weight.nbytes + budget + rest


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float16, 3), (torch.float16, 16), (torch.float32, 1)])
def test_rows_are_taken_word_by_word(dtype, channels):
    x, index = torch.randn(70, channels).to(dtype), torch.randint(70, (200,))
    for word in (2, 4, 8, 16):
        if channels * x.element_size() % word == 0:
            out = x.new_empty(200, channels)
            assert torch.equal(gather_conv_chunks.take_words(x, index.int(), out, word), x[index])
            assert torch.equal(gather_conv_chunks.take_words(x, index, out, word), x[index])


def no_voxel(children):
    return torch.zeros(0, 4), torch.zeros(27, 0, dtype=torch.int32), torch.zeros(27, 4, 5), torch.zeros(5)


def test_no_voxel():
    outputs = outputs_and_gradients(submanifold_conv, *no_voxel(1), 1)
    assert outputs[0].shape == (0, 5) and outputs[2].eq(0).all()


def implicit_gemm(x, pairs, mask, order, filters, bias):
    """Compute as spconv does: 32 voxels at a time in the order given, and of them the offsets whose bits any has."""
    assert x.dtype == filters.dtype and pairs.dtype == mask.dtype == order.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (x, pairs, mask, order, filters))
    assert filters.shape[0] % 8 == filters.shape[2] % 8 == x.shape[1] % 8 == 0
    dtype, x, filters = x.dtype, x.double(), filters.double()
    bias = None if bias is None else bias.double()
    out = x.new_full((pairs.shape[1], len(filters)), torch.nan)
    for rows, masks in zip(order.long().split(32), mask.split(32), strict=True):
        found = [k for k in range(27) if (masks >> k & 1).any()]
        if found:
            out[rows] = 0 if bias is None else bias
        for k in found:
            at = pairs[k, rows].long()
            out[rows] += x[at.clamp(min=0)].masked_fill(at[:, None] < 0, 0) @ filters[:, k].t()
    return out.to(dtype)


@pytest.fixture
def spconv_on_cpu(monkeypatch):
    monkeypatch.setattr(gather_conv_spconv, "_implicit_gemm", implicit_gemm)
    monkeypatch.setattr(gather_conv, "_on_spconv", lambda x: True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [50, 10**6])
def test_tables_for_spconv(case, rows, spconv_on_cpu, monkeypatch):
    monkeypatch.setattr(gather_conv_spconv, "GATHER_BYTES", rows * gather_conv_spconv.TABLE_BYTES)
    given = inputs(*case)
    actual = outputs_and_gradients(submanifold_conv, *given, case[0])
    assert_all_close(actual, outputs_and_gradients(by_definition, *given, case[0]))
    assert submanifold_conv(*no_voxel(1)).shape == (0, 5)


def test_spconv_that_does_not_work_is_named_and_not_used(monkeypatch, caplog):
    works = gather_conv_spconv.spconv_works
    works.cache_clear()
    monkeypatch.setattr(gather_conv_spconv, "_implicit_gemm", implicit_gemm)
    assert works(torch.device("cpu"), torch.float16) and works(torch.device("cpu"), torch.float32)
    works.cache_clear()
    monkeypatch.setattr(gather_conv_spconv, "_implicit_gemm", lambda *inputs: implicit_gemm(*inputs) + 1)
    assert not works(torch.device("cpu"), torch.float32)
    assert "not used for torch.float32 on cpu: it is off by 1" in caplog.text
    works.cache_clear()


def test_spconv_numbers_offsets_and_channels_likewise():
    """The CPU build of spconv, where it is installed."""
    pytest.importorskip("spconv")
    import spconv.pytorch as spconv
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    x, _, weight, bias = inputs(1, 5, 6, torch.float32)
    voxels = random_voxels([150, 0, 211], 10)
    conv = spconv.SubMConv3d(5, 6, 3, bias=False, indice_key="grid", algo=ConvAlgo.Native)
    with torch.no_grad():
        conv.weight.copy_(weight.permute(2, 0, 1).reshape(conv.weight.shape))
        out = conv(spconv.SparseConvTensor(x, voxels.coords, [10] * 3, 3)).features + bias
    torch.testing.assert_close(out, submanifold_conv(x, voxels.neighbors, weight, bias))
    once, zero = [1] * 3, [0] * 3
    options = [3] * 3, once, zero, once, zero, True
    _, pairs, counts = ops.get_indice_pairs(voxels.coords, 3, [10] * 3, ConvAlgo.Native, *options)
    expected = np.full((27, len(x)), -1)
    for k in range(27):  # spconv counts the first 13 offsets, and leaves out the centre
        count = counts[min(k, 26 - k)] if k != 13 else 0
        expected[k, pairs[1, k, :count]] = pairs[0, k, :count]
    expected[13] = np.arange(len(x))
    assert np.array_equal(gather_conv_spconv.pair_tables(voxels.neighbors, len(x))[0], expected)
