"""Attention of runs of rows against softmax in fp64: with a bound of the scores, and where it is too far from them."""

from itertools import pairwise

import pytest
import torch

from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.ragged import AttentionSegments, Ragged

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
H, G, D = 2, 3, 24


def make_problem(dtype):
    """Two runs of queries and keys, one of them longer than a tile, and one without keys."""
    offsets_q, offsets_k = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 5, 26, 29], [0, 41, 48, 48])
    )
    q = torch.randn(29, H * G, D, dtype=dtype)
    k, v = (torch.randn(48, H, D, dtype=dtype) for _ in range(2))
    segments = AttentionSegments(Ragged(offsets_q, len(q)), Ragged(offsets_k, len(k)))
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), segments


def softmax_attention(q, k, v, segments, scale):
    """Definition, in fp64: out, and the base-2 lse."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    edges = list(zip(*(runs.offsets.tolist() for runs in (segments.queries, segments.keys)), strict=True))
    q, k, v = (x.double().cpu() for x in (q, k, v))
    for (first_q, first_k), (last_q, last_k) in pairwise(edges):
        if last_k > first_k:
            keys, values = (x[first_k:last_k].repeat_interleave(G, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->qhk", q[first_q:last_q], keys) * scale
            out[first_q:last_q] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values)
            lse[first_q:last_q] = scores.logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case", ["close bound", "no bound", "far bound", "one long key", "far below in half precision"]
)
def test_forward_matches_softmax(case, dtype, monkeypatch):
    from d3ds2.kernels import ragged_attention_triton as kernels

    q, k, v, segments = make_problem(dtype)
    if case == "no bound":
        monkeypatch.setitem(kernels.LIMIT, dtype, -1.0)
    elif case == "far bound":  # the sum of weights below it is zero in fp32
        q, k = q.abs() * 4, -k.abs() * 4
    elif case == "one long key":
        q[:, :, 0], k[17] = 1, 0
        k[17, :, 0] = -60
    elif case == "far below in half precision":  # what stands in half precision has lost its digits
        monkeypatch.setitem(kernels.LIMIT, dtype, 1000.0)
        q, k = q.abs() * 2, -k.abs() * 2
    scale = D**-0.5
    tile = kernels.Tile(rows=32, keys=16)
    out, lse = kernels.ragged_attention_forward(q, k, v, segments, scale, tile)
    expected, expected_lse = softmax_attention(q, k, v, segments, scale)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-3 if dtype == torch.float16 else 1e-5
    )


@pytest.mark.parametrize("count", [0, 1, 300])
def test_key_norms(count):
    from d3ds2.kernels.ragged_attention_triton import key_norms

    k = torch.randn(count, H, 32, device=DEVICE, dtype=torch.bfloat16)
    expected = k.float().norm(dim=-1).amax(0) if count else torch.zeros(H, device=DEVICE)
    torch.testing.assert_close(key_norms(k), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 300, 64, 0], [3] * 100])
def test_runs_are_cut_into_tiles(lengths, size, monkeypatch):
    from d3ds2.kernels import ragged_triton as tiles_triton
    from d3ds2.kernels.ragged import cut

    monkeypatch.setattr(tiles_triton, "BLOCK", 32)  # at a time
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0).int()
    capacity = sum(lengths) // size + len(lengths) + 3
    expected_offsets, expected_runs = cut(offsets, size, capacity)
    tile_offsets, tile_runs = tiles_triton.cut_triton(offsets, size, capacity)
    assert torch.equal(tile_offsets, expected_offsets) and torch.equal(tile_runs, expected_runs)
    assert tile_offsets.dtype == tile_runs.dtype == torch.int32
