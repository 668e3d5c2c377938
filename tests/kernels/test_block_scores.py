"""The selected blocks, against those with the highest sums of softmax probabilities in plain loops."""

import pytest
import torch

from d3ds2.kernels.block_scores import select_blocks
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.ragged import AttentionPlan, Ragged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1


def make_problem(counts, children, Hk, G, D, common=0.0):
    """Make arguments of `select_blocks`. `children` has the number of compressed tokens of each block, by sample."""
    torch.manual_seed(0)
    q = torch.randn(sum(counts), Hk * G, D)
    keys = torch.randn(sum(map(sum, children)), Hk, D)
    q[..., 0] = keys[..., 0] = common  # adds common² / √D to every score
    block_of_compressed = torch.repeat_interleave(torch.tensor([n for sample in children for n in sample]))
    compressed_counts, block_counts = [sum(sample) for sample in children], [len(sample) for sample in children]
    lse = []
    for queries, sample_keys in zip(q.split(counts), keys.split(compressed_counts), strict=True):
        scores = torch.einsum("thgd,khd->thgk", queries.unflatten(1, (Hk, G)), sample_keys) * D**-0.5
        lse.append(scores.logsumexp(-1).flatten(1))
    return q, keys, torch.cat(lse), block_of_compressed, counts, compressed_counts, block_counts


def best_blocks_by_loops(q, keys, _lse, block_of_compressed, counts, compressed_counts, block_counts, top_k):
    (_, Hk, D), G = keys.shape, q.shape[1] // keys.shape[1]
    rows, first_key, first_block = [], 0, 0
    for queries, n, M in zip(q.split(counts), compressed_counts, block_counts, strict=True):
        for query in queries:
            row = []
            for h in range(Hk):
                scores = torch.zeros(M)
                for g in range(G):
                    probabilities = (keys[first_key : first_key + n, h] @ query[h * G + g] * D**-0.5).softmax(0)
                    for i, p in enumerate(probabilities):
                        scores[block_of_compressed[first_key + i] - first_block] += p
                best = sorted((scores.argsort(descending=True)[:top_k] + first_block).tolist())
                row.append(best + [-1] * (top_k - len(best)))
            rows.append(row)
        first_key, first_block = first_key + n, first_block + M
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("counts", "children", "top_k"),
    [
        pytest.param([9], [[1, 3, 2, 4]], 2, id="one-sample"),
        pytest.param([5, 4], [[1, 1, 1], [2, 5]], 1, id="top-1"),
        pytest.param([5, 0, 4], [[2, 1, 3], [], [1, 2]], 2, id="an-empty-sample"),
        pytest.param([3, 4], [[2], [3, 1, 1]], 5, id="fewer-blocks-than-top-k"),
    ],
)
@pytest.mark.parametrize("probabilities", [1 << 20, 40])
def test_matches_loops(counts, children, top_k, probabilities, monkeypatch):
    monkeypatch.setattr("d3ds2.kernels.block_scores._CPU_PROBABILITIES", probabilities)
    problem = make_problem(counts, children, Hk=2, G=3, D=8)
    block_indices = select_blocks(*problem, top_k)
    assert block_indices.dtype == torch.int32
    assert block_indices.equal(best_blocks_by_loops(*problem, top_k))


def test_logsumexp_beyond_the_range_of_exp():
    problem = make_problem([6], [[2, 1, 3, 1]], Hk=1, G=2, D=8, common=20.0)
    assert problem[2].min() > 88.7
    assert select_blocks(*problem, 2).equal(best_blocks_by_loops(*problem, 2))


def test_order_of_compressed_tokens_does_not_matter():
    q, keys, lse, block_of_compressed, *counts = make_problem([7], [[3, 1, 2, 4]], Hk=2, G=2, D=8)
    order = torch.randperm(len(keys))
    shuffled = select_blocks(q, keys[order], lse, block_of_compressed[order], *counts, 2)
    assert shuffled.equal(select_blocks(q, keys, lse, block_of_compressed, *counts, 2))


def offsets(counts):
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


def in_order_of_children(children, block_counts):
    """Return the blocks sorted by sample, those with most children first."""
    samples = [i for i, count in enumerate(block_counts) for _ in range(count)]
    order = sorted(range(len(children)), key=lambda i: (samples[i], -children[i]))
    return torch.tensor(order, dtype=torch.int32, device=DEVICE)


def select_by_triton(q, keys, lse, block_of_compressed, counts, compressed_counts, block_counts, top_k, **tile):
    """Select by the kernel, with the keys shuffled."""
    from d3ds2.kernels.block_scores_triton import ScoreTile, select_blocks_triton
    from d3ds2.kernels.ragged_attention_triton import LOG2_E

    shuffled = torch.randperm(len(keys))
    block_of_compressed = block_of_compressed[shuffled]
    children = torch.bincount(block_of_compressed, minlength=sum(block_counts)).tolist()
    order = block_of_compressed.argsort(stable=True).int().to(DEVICE)
    branches = AttentionPlan(
        samples=Ragged(offsets(counts), len(q)),
        compressed=Ragged(offsets(compressed_counts), len(keys)),
        blocks=Ragged(offsets(children), len(keys)),
        windows=Ragged(offsets(counts), len(q)),
        children=Ragged(offsets(children), len(keys), order),
        sample_blocks=offsets(block_counts),
        max_blocks=max(block_counts),
        block_order=None if set(children) == {1} else in_order_of_children(children, block_counts),
    )
    q, keys, lse = (x.to(DEVICE) for x in (q, keys[shuffled], lse * LOG2_E))
    return select_blocks_triton(q, keys, lse, branches, top_k, q.shape[2] ** -0.5, ScoreTile(**tile)).cpu()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("rows", "ranked"), [(16, 1), (64, 8)])
@pytest.mark.parametrize(
    ("counts", "children", "top_k", "G", "D"),
    [
        pytest.param([9], [[1, 3, 2, 4]], 2, 3, 8, id="one-sample"),
        pytest.param([5, 0, 4], [[2, 1, 3], [], [1, 2]], 1, 16, 16, id="an-empty-sample"),
        pytest.param([3, 4], [[2], [3, 1, 1]], 5, 1, 24, id="fewer-blocks-than-top-k"),
        pytest.param([6], [[1] * 70], 33, 2, 16, id="many-blocks"),
        pytest.param([5], [[1, 2, 3, 1, 5] * 29], 8, 16, 32, id="more-blocks-than-lanes"),
        pytest.param([2], [[1] * 150], 64, 16, 16, id="64-blocks-selected"),
    ],
)
def test_kernel_matches_the_definition(counts, children, top_k, G, D, rows, ranked):
    problem = make_problem(counts, children, Hk=2, G=G, D=D)
    actual = select_by_triton(*problem, top_k, rows=rows, blocks=16, ranked=ranked)
    assert actual.equal(select_blocks(*problem, top_k))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernel_takes_the_first_of_equal_blocks():
    q, keys, _, *rest = make_problem([5], [[1] * 20], Hk=1, G=2, D=16)
    keys[3:] = keys[2]
    scores = torch.einsum("tgd,kd->tgk", q, keys[:, 0]) * 16**-0.5
    actual = select_by_triton(q, keys, scores.logsumexp(-1), *rest, 6, rows=16)
    for query, row in zip(scores.softmax(-1).sum(1), actual[:, 0].tolist(), strict=True):
        best = {i for i in (0, 1) if query[i] > query[2]}
        assert row == sorted(best | set(range(2, 8 - len(best))))


def test_wrong_shapes_are_named():
    q, keys, lse, block_of_compressed, *counts = make_problem([7], [[3, 1]], Hk=2, G=2, D=8)
    with pytest.raises(ValueError, match="expected q"):
        select_blocks(q, keys, lse.t(), block_of_compressed, *counts, 2)
