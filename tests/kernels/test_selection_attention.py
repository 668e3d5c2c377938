"""Selection attention against its definition, outputs and gradients: the batched form, and the kernels."""

import pytest
import torch

from d3ds2.kernels.attention_tiles import Tile
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.pair_gradients import pair_dkdv_reference
from d3ds2.kernels.pair_order import pairs_by_block
from d3ds2.kernels.ragged import AttentionSegments, Ragged
from d3ds2.kernels.selection_attention import selection_attention, selection_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1


def batched(q, k, v, block_offsets, block_indices, scale):
    """Attend by the public function, on the CPU."""
    arguments = (tensor.cpu() for tensor in (q, k, v, block_offsets, block_indices))
    return selection_attention(*arguments, scale).to(q.device)


def triton_kernel(*arguments):
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    from d3ds2.kernels.selection_attention_triton import selection_attention_triton

    return selection_attention_triton(*arguments)


FORMS = [pytest.param(batched, id="batched"), pytest.param(triton_kernel, id="triton")]


def make_problem(block_sizes, Hk, G, D, K, dtype=torch.float32, empty_query=False):
    """Make arguments of `selection_attention` without the scale."""
    torch.manual_seed(0)
    T, M = sum(block_sizes), len(block_sizes)
    q = torch.randn(T, Hk * G, D, dtype=dtype, device=DEVICE, requires_grad=True)
    k = torch.randn(T, Hk, D, dtype=dtype, device=DEVICE, requires_grad=True)
    v = torch.randn(T, Hk, D, dtype=dtype, device=DEVICE, requires_grad=True)
    block_offsets = torch.tensor([0, *block_sizes], device=DEVICE).cumsum(0).int()
    block_indices = torch.full((T, Hk, K), -1, dtype=torch.int32, device=DEVICE)
    chosen = torch.rand(T, Hk, M, device=DEVICE).topk(min(K, M)).indices.int()
    block_indices[..., : chosen.shape[-1]] = chosen
    if empty_query:
        block_indices[0] = -1
    return q, k, v, block_offsets, block_indices


def outputs_and_gradients(attend, q, k, v, block_offsets, block_indices):
    out = attend(q, k, v, block_offsets, block_indices, q.shape[-1] ** -0.5)
    torch.manual_seed(1)
    return out, *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).to(out))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("block_sizes", "Hk", "G", "D", "K"),
    [
        pytest.param([5, 1, 7], 1, 16, 16, 2, id="three-small-blocks"),
        pytest.param([3], 1, 16, 32, 4, id="fewer-blocks-than-K"),
        pytest.param([66, 1, 2], 1, 16, 16, 2, id="blocks-longer-than-a-tile"),
        pytest.param([5, 4, 6], 2, 32, 16, 3, id="all-selected"),
        pytest.param([6, 8, 3], 2, 3, 24, 2, id="odd-group-and-width"),
        pytest.param([4, 5, 2], 2, 1, 8, 2, id="no-groups"),
    ],
)
def test_matches_reference(form, block_sizes, Hk, G, D, K):
    problem = make_problem(block_sizes, Hk, G, D, K)
    expected = outputs_and_gradients(selection_attention_reference, *problem)
    actual = outputs_and_gradients(form, *problem)
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("form", FORMS)
def test_query_without_block_is_zero_and_has_no_gradient(form):
    problem = make_problem([4, 4], 1, 16, 16, 2, empty_query=True)
    out, dq, dk, dv = outputs_and_gradients(form, *problem)
    assert out[0].eq(0).all() and dq[0].eq(0).all()
    assert dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_selecting_every_block_is_full_attention(form):
    q, k, v, block_offsets, block_indices = make_problem([6, 3, 8], 2, 16, 16, 3)
    out = form(q, k, v, block_offsets, block_indices, 16**-0.5)
    full = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=True
    )
    torch.testing.assert_close(out, full[0].transpose(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_scores_beyond_the_range_of_exp(form):
    q, k, v, block_offsets, block_indices = make_problem([6, 3, 8], 1, 16, 16, 2)
    with torch.no_grad():
        q, k = q * 40, k * 10
    problem = (q.requires_grad_(), k.requires_grad_(), v, block_offsets, block_indices)
    expected = outputs_and_gradients(selection_attention_reference, *problem)
    for a, e in zip(outputs_and_gradients(form, *problem), expected, strict=True):
        torch.testing.assert_close(a, e, atol=5e-3, rtol=1e-3)


def test_gradients_in_double_precision():
    q, k, v, block_offsets, block_indices = (x.cpu() for x in make_problem([3, 1, 2], 2, 2, 3, 2, torch.float64, True))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: selection_attention(*qkv, block_offsets, block_indices), (q, k, v))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form):
    problem = make_problem([20, 5, 12], 2, 16, 16, 2, torch.float16)
    wide = [x.detach().float().requires_grad_() if x.is_floating_point() else x for x in problem]
    expected = outputs_and_gradients(selection_attention_reference, *wide)
    torch.manual_seed(1)
    out = form(*problem, 16**-0.5)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected[0], atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_chunks_of_queries_do_not_change_the_result(monkeypatch):
    problem = make_problem([12, 1, 8], 2, 2, 16, 2, empty_query=True)
    whole = outputs_and_gradients(triton_kernel, *problem)
    monkeypatch.setattr("d3ds2.kernels.selection_attention_triton.PARTIAL_BYTES", 4000)  # 8 queries at a time
    for a, e in zip(outputs_and_gradients(triton_kernel, *problem), whole, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("chunk", [4, 64])
def test_gradients_of_keys_match_the_definition(chunk):
    """One block is longer than a tile of keys; blocks are selected by nobody, by few and by many queries."""
    from d3ds2.kernels.pair_gradients_triton import pair_dkdv
    from d3ds2.kernels.ragged_attention_triton import ragged_attention_dkdv
    from d3ds2.kernels.selection_attention_triton import select_forward

    block_sizes, K, scale = [21, 1, 4], 2, 24**-0.5
    q, k, v, block_offsets, block_indices = (x.detach() for x in make_problem(block_sizes, 2, 3, 24, K))
    block_indices[block_indices == 1] = -1
    blocks = Ragged(block_offsets, len(k), longest=max(block_sizes))
    selected = select_forward(q, k, v, blocks, block_indices, scale)
    dout = torch.randn(selected.out.shape).to(selected.out)
    stats = torch.stack([selected.lse, (selected.out * dout).sum(-1)], dim=-1)
    pair_offsets, pair_ids = pairs_by_block(block_indices, len(block_sizes))
    segments = AttentionSegments(Ragged(pair_offsets, len(pair_ids), pair_ids), blocks, K)
    arguments = q, k, v, segments, stats, dout, scale
    expected = pair_dkdv_reference(*arguments)
    tile = Tile(32, 16)
    for actual in (pair_dkdv(*arguments, tile, chunk), ragged_attention_dkdv(*arguments, tile)):
        for name, a, e in zip(("dk", "dv"), actual, expected, strict=True):
            torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")


def test_an_empty_batch():
    q, k = torch.zeros(0, 4, 16), torch.zeros(0, 2, 16)
    out = selection_attention(q, k, k, torch.zeros(1, dtype=torch.int32), torch.zeros(0, 2, 3, dtype=torch.int32))
    assert out.shape == q.shape


def test_pairs_by_block():
    block_indices = torch.tensor([[[1, -1]], [[0, 1]], [[2, 1]]], dtype=torch.int32)  # (T, Hk, K) = (3, 1, 2)
    pair_offsets, pair_ids = pairs_by_block(block_indices, num_blocks=3)
    assert pair_offsets.tolist() == [0, 1, 4, 5]
    assert pair_ids.tolist() == [2, 0, 3, 5, 4, 1]  # pair 1 has no block
    assert pair_offsets.dtype == pair_ids.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"k": torch.zeros(9, 1, 16)}, "got q", id="k-and-v-differ"),
        pytest.param({"block_indices": torch.zeros(2, 1, 1)}, "expected block_indices", id="block-indices-too-short"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    names = ("q", "k", "v", "block_offsets", "block_indices")
    arguments = dict(zip(names, make_problem([4, 4], 1, 16, 16, 2), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        selection_attention(**arguments)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("T", "Hk", "K", "M"),
    [(1, 1, 1, 1), (700, 2, 3, 5), (300, 2, 8, 127), (90, 1, 4, 0), (90, 2, 3, 200), (0, 2, 3, 5)],
)
def test_order_of_pairs_matches_the_definition(T, Hk, K, M):
    """By counting and by sorting; some queries have no block."""
    from d3ds2.kernels import pair_order_triton

    block_indices = torch.randint(-1, M, (T, Hk, K), dtype=torch.int32, device=DEVICE)
    orders = [pair_order_triton.pairs_by_block_triton]
    if T and Hk * M < pair_order_triton.MAX_LISTS:
        orders.append(pair_order_triton.count_pairs)
    for order in orders:
        for a, e in zip(order(block_indices, M), pairs_by_block(block_indices, M), strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)
