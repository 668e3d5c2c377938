"""Selection attention: the batched form and the Triton kernel against the definition, outputs and gradients."""

import pytest
import torch

from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.selection_attention import queries_by_block, selection_attention, selection_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1


def batched(q, k, v, block_offsets, block_indices, scale):
    """The public function, on the CPU."""
    arguments = (tensor.cpu() for tensor in (q, k, v, block_offsets, block_indices))
    return selection_attention(*arguments, scale).to(q.device)


def triton_kernel(*arguments):
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    from d3ds2.kernels.selection_attention_triton import selection_attention_triton

    return selection_attention_triton(*arguments)


FORMS = [pytest.param(batched, id="batched"), pytest.param(triton_kernel, id="triton")]


def make_problem(block_sizes, H, G, D, S, dtype=torch.float32, empty_query=False):
    torch.manual_seed(0)
    T, M = sum(block_sizes), len(block_sizes)
    q = torch.randn(T, H * G, D, dtype=dtype, device=DEVICE, requires_grad=True)
    k = torch.randn(T, H, D, dtype=dtype, device=DEVICE, requires_grad=True)
    v = torch.randn(T, H, D, dtype=dtype, device=DEVICE, requires_grad=True)
    block_offsets = torch.tensor([0, *block_sizes], device=DEVICE).cumsum(0).int()
    block_indices = torch.full((T, H, S), -1, dtype=torch.int32, device=DEVICE)
    chosen = torch.rand(T, H, M, device=DEVICE).topk(min(S, M)).indices.int()
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
    ("block_sizes", "H", "G", "D", "S"),
    [
        pytest.param([5, 1, 7], 1, 16, 16, 2, id="three-small-blocks"),
        pytest.param([3], 1, 16, 32, 4, id="one-block-fewer-than-S"),
        pytest.param([66, 1, 2], 1, 16, 16, 2, id="blocks-longer-than-a-tile"),
        pytest.param([5, 4, 6], 2, 32, 16, 3, id="all-selected"),
        pytest.param([6, 8, 3], 2, 3, 24, 2, id="odd-group-and-width"),
        pytest.param([4, 5, 2], 2, 1, 8, 2, id="no-groups"),
    ],
)
def test_matches_reference(form, block_sizes, H, G, D, S):
    problem = make_problem(block_sizes, H, G, D, S)
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
def test_queries_in_turn_do_not_change_the_result(monkeypatch):
    problem = make_problem([12, 1, 8], 2, 2, 16, 2, empty_query=True)
    whole = outputs_and_gradients(triton_kernel, *problem)
    monkeypatch.setattr("d3ds2.kernels.selection_attention_triton.PARTIAL_BYTES", 4000)  # 8 queries at a time
    for a, e in zip(outputs_and_gradients(triton_kernel, *problem), whole, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("chunk", [4, 64])
def test_chunks_of_long_lists_add_up(chunk):
    """Blocks that nobody, few and many queries selected; one of them longer than a tile of keys."""
    from d3ds2.kernels.pair_gradients_triton import pair_dkdv
    from d3ds2.kernels.ragged import AttentionSegments, Ragged
    from d3ds2.kernels.ragged_attention_triton import Tile, ragged_attention_dkdv
    from d3ds2.kernels.selection_attention_triton import pairs_by_block, select_forward

    sizes = [21, 1, 4]
    q, k, v, block_offsets, block_indices = (x.detach() for x in make_problem(sizes, 2, 3, 24, 2))
    block_indices[block_indices == 1] = -1
    blocks, scale = Ragged(block_offsets, len(k), longest=max(sizes)), 24**-0.5
    out, lse, _, _ = select_forward(q, k, v, blocks, block_indices, scale)
    dout = torch.randn(out.shape).to(out)
    pair_offsets, pair_ids = pairs_by_block(block_indices, len(sizes))
    segments = AttentionSegments(Ragged(pair_offsets, len(pair_ids), pair_ids), blocks, 2)
    stats = torch.stack([lse, (out * dout).sum(-1)], dim=-1)
    arguments = q, k, v, segments, stats, dout, scale, Tile(32, 16)
    for a, e in zip(pair_dkdv(*arguments, chunk), ragged_attention_dkdv(*arguments), strict=True):
        torch.testing.assert_close(a, e)


def test_an_empty_batch():
    q, k = torch.zeros(0, 4, 16), torch.zeros(0, 2, 16)
    out = selection_attention(q, k, k, torch.zeros(1, dtype=torch.int32), torch.zeros(0, 2, 3, dtype=torch.int32))
    assert out.shape == q.shape


def test_queries_by_block_inverts_the_selection():
    block_indices = torch.tensor([[[1, -1]], [[0, 1]], [[2, 1]]], dtype=torch.int32)  # (T, H, S) = (3, 1, 2)
    query_offsets, query_ids = queries_by_block(block_indices, num_blocks=3)
    assert query_offsets.tolist() == [0, 1, 4, 5]
    assert query_ids.tolist() == [1, 0, 1, 2, 2, 0]  # query 0 has a -1


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
@pytest.mark.parametrize(("T", "H", "S", "M"), [(1, 1, 1, 1), (700, 2, 3, 5), (300, 2, 8, 127), (90, 1, 4, 0)])
def test_order_of_pairs(T, H, S, M):
    """By counting as by sorting; some queries have no block."""
    from d3ds2.kernels.pair_order_triton import MAX_BINS, order_pairs_triton

    assert H * M < MAX_BINS
    block_indices = torch.randint(-1, M, (T, H, S), dtype=torch.int32, device=DEVICE)
    keys = torch.where(block_indices < 0, H * M, torch.arange(H, device=DEVICE)[:, None] * M + block_indices).flatten()
    pair_offsets, pair_ids = order_pairs_triton(block_indices, M)
    assert torch.equal(pair_ids.long(), keys.argsort(stable=True))
    ends = torch.bincount(keys, minlength=H * M + 1).cumsum(0)
    assert pair_offsets.tolist() == [0, *ends[:-1].tolist()]
    assert pair_ids.dtype == pair_offsets.dtype == torch.int32
