"""The kernels of attention between segments against the definition in fp64, and tiles of segments."""

import math
from dataclasses import replace

import pytest
import torch

from d3ds2.kernels.attention_tiles import Tile
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.ragged import AttentionSegments, Ragged, cut_reference
from d3ds2.kernels.ragged_attention import ragged_attention_reference

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
H, G, D = 2, 3, 24
SCALE, TILE = D**-0.5, Tile(rows=32, keys=16)


def ragged(*offsets, ids=None):
    offsets, total = torch.tensor(offsets, dtype=torch.int32, device=DEVICE), offsets[-1]
    return Ragged(offsets, total, None if ids is None else torch.tensor(ids, dtype=torch.int32, device=DEVICE))


def make_problem(dtype):
    """Three segments: one with more queries and one with more keys than a tile, and one without keys."""
    segments = AttentionSegments(ragged(0, 5, 26, 29), ragged(0, 41, 48, 48))
    return *make_inputs(29, 48, dtype), segments


def make_inputs(T, Tk, dtype):
    shapes = (T, H * G, D), (Tk, H, D), (Tk, H, D)
    return [torch.randn(shape, dtype=dtype).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case", ["close bound", "no bound", "far bound", "one long key", "far below in half precision"]
)
def test_forward_matches_the_definition(case, dtype, monkeypatch):
    from d3ds2.kernels import ragged_attention_triton as kernels

    q, k, v, segments = make_problem(dtype)
    if case == "no bound":
        monkeypatch.setitem(kernels.MAX_BOUND, dtype, -1.0)
    elif case == "far bound":  # all weights below it are zero in fp32
        q, k = q.abs() * 4, -k.abs() * 4
    elif case == "one long key":
        q[:, :, 0], k[17] = 1, 0
        k[17, :, 0] = -60
    elif case == "far below in half precision":  # weights this small have lost digits
        monkeypatch.setitem(kernels.MAX_BOUND, dtype, 1000.0)
        q, k = q.abs() * 2, -k.abs() * 2
    out, lse = kernels.ragged_attention_forward(q, k, v, segments, SCALE, TILE)
    expected, expected_lse = ragged_attention_reference(q.double(), k.double(), v.double(), segments, SCALE)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3 if dtype == torch.float16 else 1e-5)


def test_the_definition_is_attention():
    """Against torch's own, of the first segment."""
    q, k, v, segments = make_problem(torch.float64)
    out, lse = ragged_attention_reference(q, k, v, segments, SCALE)
    heads = q[:5].transpose(0, 1), *(x[:41].repeat_interleave(G, 1).transpose(0, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, scale=SCALE).transpose(0, 1)
    torch.testing.assert_close(out[:5], expected)
    assert (out[26:] == 0).all() and (lse[26:] == -torch.inf).all()


def test_gradients_match_those_of_the_definition():
    """In windows, whose queries and keys are listed by the same ids; the keys come in parts."""
    from d3ds2.kernels import ragged_attention_triton as kernels

    windows = ragged(0, 21, 22, 22, 40, ids=torch.randperm(40).tolist())
    segments, inputs = AttentionSegments(windows, windows), make_inputs(40, 40, torch.float32)
    exact = [x.double().requires_grad_() for x in inputs]
    expected, expected_lse = ragged_attention_reference(*exact, segments, SCALE)
    out, lse = kernels.ragged_attention_forward(*inputs, segments, SCALE, TILE)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    dout = torch.randn(out.shape).to(out)
    stats = torch.stack([lse, (out * dout).sum(-1)], dim=-1)
    arguments = *inputs, segments, stats, dout, SCALE
    tiles = TILE, replace(TILE, splits=2)
    actual = kernels.ragged_attention_dq(*arguments, tiles[0]), *kernels.ragged_attention_dkdv(*arguments, tiles[1])
    for a, e in zip(actual, torch.autograd.grad(expected, exact, dout.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_pairs_match_the_definition():
    """With two places for each query row, and gradients of one softmax over both."""
    from d3ds2.kernels import ragged_attention_triton as kernels

    T, P, keys = 12, 2, ragged(0, 5, 24, 27)
    blocks = torch.stack([torch.randperm(3)[:P] for _ in range(T * H)]).flatten()  # the block of each pair
    segment = torch.arange(T * H * P) // P % H * 3 + blocks
    order, ends = segment.argsort(stable=True), torch.bincount(segment, minlength=H * 3).cumsum(0)
    segments = AttentionSegments(ragged(0, *ends.tolist(), ids=order.tolist()), keys, P)
    inputs = make_inputs(T, 27, torch.float32)
    exact = [x.double().requires_grad_() for x in inputs]
    expected, expected_lse = ragged_attention_reference(*exact, segments, SCALE)
    out, lse = kernels.ragged_attention_forward(*inputs, segments, SCALE, TILE)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)

    weights = (expected_lse * math.log(2)).unflatten(0, (T * H, P)).softmax(1)  # of the places of a row
    merged = (expected.unflatten(0, (T * H, P)) * weights[..., None]).sum(1).view(T, H * G, D)
    merged_lse = expected_lse.detach().unflatten(0, (T * H, P)).exp2().sum(1).log2().view(T, H * G)
    dout = torch.randn(merged.shape).to(merged)
    stats = torch.stack([merged_lse, (merged.detach() * dout).sum(-1)], dim=-1).float()
    arguments = *inputs, segments, stats, dout.float(), SCALE, TILE
    dq = kernels.ragged_attention_dq(*arguments).unflatten(0, (T * H, P)).sum(1).view(T, H * G, D)
    actual = dq, *kernels.ragged_attention_dkdv(*arguments)
    for a, e in zip(actual, torch.autograd.grad(merged, exact, dout), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_key_norms(count):
    from d3ds2.kernels.ragged_attention_triton import key_norms

    k = torch.randn(count, H, 32, device=DEVICE, dtype=torch.bfloat16)
    expected = k.float().norm(dim=-1).amax(0) if count else torch.zeros(H, device=DEVICE)
    torch.testing.assert_close(key_norms(k), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 300, 64, 0], [3] * 100])
def test_segments_are_cut_into_tiles(lengths, size, monkeypatch):
    from d3ds2.kernels import ragged_triton

    monkeypatch.setattr(ragged_triton, "SEGMENTS", 32)
    monkeypatch.setattr(ragged_triton, "TILES", 32)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0).int()
    capacity = sum(lengths) // size + len(lengths) + 3
    expected_offsets, expected_segments = cut_reference(offsets, size, capacity)
    tile_offsets, tile_segments = ragged_triton.cut_triton(offsets, size, capacity)
    assert torch.equal(tile_offsets, expected_offsets) and torch.equal(tile_segments, expected_segments)
    assert tile_offsets.dtype == tile_segments.dtype == torch.int32
