"""A sliding window against its definition, and spatial sparse attention whose windows or branches are left out."""

import dataclasses

import pytest
import torch

from d3ds2.geometry.attention_plan import attention_plan
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.ragged import Ragged
from d3ds2.kernels.sliding_window import SlidingWindow, sliding_window_attention, sliding_window_attention_reference
from d3ds2.kernels.spatial_sparse_attention import _select, _select_on_triton, packed_attention_with_lse
from tests.support.random_voxels import random_voxels


@pytest.mark.parametrize("reach", [1, 3, 8, 40])
@pytest.mark.parametrize("counts", [[19, 0, 1, 11], [8], [1]])
def test_sliding_window_is_a_band_within_each_sample(reach, counts):
    torch.manual_seed(0)
    N = sum(counts)
    samples = Ragged(torch.tensor([0, *counts]).cumsum(0).int(), N)
    q, k, v, weight = (torch.randn(N, heads, 5, dtype=torch.float64) for heads in (4, 2, 2, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for out in (
        sliding_window_attention(q, k, v, SlidingWindow.over(samples, reach)),
        sliding_window_attention_reference(q, k, v, samples, reach),
    ):
        results.append([out, *torch.autograd.grad(out, inputs, weight)])
    for fast, expected in zip(*results, strict=True):
        torch.testing.assert_close(fast, expected)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_blocks_are_selected_alike_with_and_without_triton(monkeypatch):
    """On a GPU, attention with some of the branches takes the blocks that the kernel selects."""
    from d3ds2.kernels import block_scores_triton

    # the interpreter takes as long to rank 16 queries as one
    monkeypatch.setattr(block_scores_triton, "FP32", dataclasses.replace(block_scores_triton.FP32, ranked=16))
    voxels = random_voxels([20, 0, 9], 16)
    plan = attention_plan(voxels, 4, 0, 0)
    q, compressed = torch.randn(len(voxels), 2, 16), torch.randn(len(voxels.coarsen(4)[0]), 1, 16)
    samples, of_compressed = plan.samples, plan.compressed
    offsets, lengths = (samples.offsets, of_compressed.offsets), (samples.lengths, of_compressed.lengths)
    lse = packed_attention_with_lse(q, compressed, compressed, *offsets, *lengths)[1]
    expected = _select(q, compressed, lse, plan, 2)
    assert plan.windows is None and torch.equal(_select_on_triton(q, compressed, lse, plan, 2), expected)
