"""Sums of segments of rows: the kernel against the definition, and the gradients of both operations."""

import pytest
import torch

from d3ds2.geometry.segments import tokens_of_cells
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.ragged import Ragged
from d3ds2.kernels.segment_sum import (
    per_token,
    sample_means,
    sample_sums,
    segment_sum,
    segment_sum_bags,
    segment_sum_reference,
    take_segments,
)
from d3ds2.layers.sparse_conv import mean_pool
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1


def make_segments(lengths, in_order):
    """The segments, and the segment of each row."""
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    segment_of_place = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    if in_order:
        return Ragged(offsets, sum(lengths)), segment_of_place
    ids = torch.randperm(sum(lengths)).to(DEVICE)
    segment_of_row = torch.empty_like(segment_of_place)
    segment_of_row[ids] = segment_of_place
    return Ragged(offsets, sum(lengths), ids.int()), segment_of_row


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("lengths", "C"), [([3, 0, 70, 1], 5), ([40], 100)])
def test_kernel_matches_the_definition(lengths, C, in_order):
    from d3ds2.kernels.segment_sum_triton import segment_sum_triton

    segments, segment_of_row = make_segments(lengths, in_order)
    x = torch.randn(sum(lengths), C).to(DEVICE)
    expected = segment_sum_reference(x, segments, segment_of_row)
    torch.testing.assert_close(segment_sum_triton(x, segments), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("lengths", [[3, 0, 70, 1, 0], [40]])
def test_bags_match_the_definition(lengths, in_order, dtype, monkeypatch):
    monkeypatch.setattr("d3ds2.kernels.segment_sum.COPY_BYTES", 1)  # 8 columns at a time
    segments, segment_of_row = make_segments(lengths, in_order)
    x = torch.randn(sum(lengths), 20, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(segment_sum_bags(x, segments), segment_sum_reference(x, segments, segment_of_row))


@pytest.mark.parametrize("in_order", [True, False])
def test_gradients(in_order):
    segments, segment_of_row = make_segments([3, 0, 4, 1], in_order)
    rows = torch.randn(8, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    sums = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, segments, segment_of_row), rows)
    assert torch.autograd.gradcheck(lambda x: take_segments(x, segments, segment_of_row), sums)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 4], [7], [0, 0]])
def test_rows_of_samples(counts, known):
    """A row for each token of its sample, and sums and means over the tokens: values and gradients."""
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    samples = Ragged(offsets, sum(counts), known_lengths=counts if known else None)
    rows = torch.randn(sum(counts), 5, device=DEVICE)
    expected = torch.stack([part.sum(0) for part in rows.split(counts)])
    torch.testing.assert_close(sample_sums(rows, samples), expected)
    divisors = torch.tensor(counts, device=DEVICE).clamp(min=1)[:, None]
    torch.testing.assert_close(sample_means(rows, samples), expected / divisors)
    segment_of_row = torch.arange(len(counts), device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    assert torch.equal(samples.membership, torch.eye(len(counts), device=DEVICE)[segment_of_row].t())
    x = torch.randn(len(counts), 5, device=DEVICE, requires_grad=True)
    taken = per_token(x, samples).expand(len(rows), -1)
    assert torch.equal(taken, x[segment_of_row])
    torch.testing.assert_close(torch.autograd.grad(taken, x, rows)[0], expected)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("factor", [2, 8])
@pytest.mark.parametrize("resolution", [16, 128])
def test_cells_of_a_pool(factor, resolution):
    from d3ds2.kernels.segment_sum_triton import segment_sum_triton

    voxels = random_voxels([30, 0, 20], resolution).to(DEVICE)
    x = torch.randn(50, 6).to(DEVICE)
    pooled, coarse = mean_pool(x, voxels, factor)
    parent = voxels.coarsen(factor)[1]
    total = torch.zeros(len(coarse), 6, device=DEVICE).index_add_(0, parent, x)
    sums = segment_sum_triton(x, tokens_of_cells(voxels, factor))
    torch.testing.assert_close(sums, total)
    torch.testing.assert_close(pooled, total / (voxels.coarse_counts(factor) + 1)[:, None])
