"""Packed attention and its layers against dense softmax attention, one segment at a time."""

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels.packed_attention import _logsumexp as logsumexp_of_scores
from d3ds2.kernels.packed_attention import packed_attention, packed_attention_with_lse
from d3ds2.layers.attention import CrossAttention, SelfAttention, WindowAttention

LENGTHS = [
    pytest.param([5, 3], [4, 7], id="two-segments"),
    pytest.param([1], [1], id="one-token"),
    pytest.param([0, 6, 0], [3, 2, 0], id="empty-segments"),
    pytest.param([4, 2], [0, 3], id="a-segment-without-keys"),
]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_problem(lengths_q, lengths_k, heads=4, kv_heads=2, channels=8):
    torch.manual_seed(0)
    q = torch.randn(sum(lengths_q), heads, channels, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), kv_heads, channels, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return q, k, v, offsets(lengths_q), offsets(lengths_k), lengths_q, lengths_k


def reference(q, k, v, lengths_q, lengths_k, scale):
    """Return out and lse, with the softmax written out."""
    group = q.shape[1] // k.shape[1]
    outputs, lses = [], []
    for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b.repeat_interleave(group, 1)) * scale
        weights = scores.softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, c.repeat_interleave(group, 1)))
        lses.append(scores.logsumexp(-1).t())
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_packed_attention(lengths_q, lengths_k, scale):
    problem = make_problem(lengths_q, lengths_k)
    leaves = problem[:3]
    expected, expected_lse = reference(*leaves, lengths_q, lengths_k, 8**-0.5 if scale is None else scale)
    out = packed_attention(*problem, scale)
    out_2, lse = packed_attention_with_lse(*problem, scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out_2, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    assert lse.dtype == torch.float32 and not lse.requires_grad

    weights = torch.randn_like(out)
    for result in (out, out_2):
        grads = torch.autograd.grad((result * weights).sum(), leaves, retain_graph=True)
        expected_grads = torch.autograd.grad((expected * weights).sum(), leaves, retain_graph=True)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)


def test_no_segments_at_all():
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    out, lse = packed_attention_with_lse(q, k, k, cu_seqlens, cu_seqlens, [], [])
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    assert packed_attention(q, k, k, cu_seqlens, cu_seqlens, [], []).shape == (0, 4, 8)


def test_scores_beyond_the_range_of_exp():
    q, k = torch.full((2, 1, 16), 30.0), torch.tensor([20.0, -20.0])[:, None, None].expand(2, 1, 16)
    out, lse = packed_attention_with_lse(q, k, k, offsets([2]), offsets([2]), [2], [2])
    torch.testing.assert_close(out, torch.full((2, 1, 16), 20.0))
    torch.testing.assert_close(lse, torch.full((2, 1), 30.0 * 20.0 * 16 / 4))


def test_logsumexp_in_chunks(monkeypatch):
    monkeypatch.setattr("d3ds2.kernels.packed_attention._LSE_ELEMENTS", 20)
    q, k = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    expected = (q @ k.transpose(1, 2) * 8**-0.5).logsumexp(-1)
    torch.testing.assert_close(logsumexp_of_scores(q, k, None), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"k": torch.zeros(11, 3, 8)}, "Hk dividing H", id="kv-heads-do-not-divide"),
        pytest.param({"v": torch.zeros(10, 2, 8)}, "Hk dividing H", id="v-differs-from-k"),
        pytest.param({"lengths_q": [5, 4]}, "sums 8 and 11", id="lengths-do-not-sum-up"),
        pytest.param({"lengths_k": [11]}, "equally many segments", id="segments-differ"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "lengths_q", "lengths_k")
    arguments = dict(zip(names, make_problem([5, 3], [4, 7]), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)


@pytest.mark.parametrize("shift", [0, 4])
def test_window_attention_is_masked_attention(shift):
    torch.manual_seed(0)
    coords = torch.cat([torch.randint(0, 2, (150, 1)), torch.randint(0, 16, (150, 3))], dim=1).unique(dim=0)
    voxels = Voxels.sort(coords, 16)[0]
    layer, x = WindowAttention(24, 3), torch.randn(len(voxels), 24)
    out = layer(x, voxels.windows(shift))

    q, k, v = layer.to_qkv(x).view(-1, 3, 3, 8).permute(1, 2, 0, 3)  # (heads, N, 8) each
    cells = torch.cat([voxels.coords[:, :1], (voxels.coords[:, 1:] + shift) // 8], dim=1)
    together = (cells[:, None] == cells).all(-1)
    weights = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(~together, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, layer.to_out((weights @ v).transpose(0, 1).flatten(1)))


def test_cross_attention_reads_the_context_of_its_sample():
    torch.manual_seed(0)
    layer, x, context = CrossAttention(16, 12, 2), torch.randn(7, 16), torch.randn(5, 12)
    out = layer(x, context, offsets([4, 3]), offsets([2, 3]), [4, 3], [2, 3])
    first = layer(x[:4], context[:2], offsets([4]), offsets([2]), [4], [2])
    second = layer(x[4:], context[2:], offsets([3]), offsets([3]), [3], [3])
    torch.testing.assert_close(out, torch.cat([first, second]))


def test_self_attention_normalizes_queries_and_keys():
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2, qk_rms_norm=True), torch.randn(2, 5, 16)
    with torch.no_grad():
        layer.to_qkv.weight[:32] *= 100  # the norm removes the scale of queries and keys
        layer.to_qkv.bias.zero_()
        scaled = layer(x)
        layer.to_qkv.weight[:32] /= 100
        torch.testing.assert_close(scaled, layer(x), atol=1e-5, rtol=1e-4)
        plain = SelfAttention(16, 2, qk_rms_norm=False)
        plain.load_state_dict(layer.state_dict(), strict=False)
        assert not torch.allclose(plain(x), scaled, atol=1e-3)
