"""On a CUDA device: the attention kernels against fp64, for difficult sizes and values, and in a CUDA graph."""

import pytest
import torch

from benchmarks.structures import surface_voxels
from d3ds2.geometry.attention_plan import attention_plan
from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels.selection_attention import selection_attention, selection_attention_reference
from d3ds2.kernels.spatial_sparse_attention import spatial_sparse_attention_reference
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention

pytestmark = pytest.mark.gpu
H, G, D = 2, 16, 32


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def outputs_and_gradients(function, inputs, weight, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, weight.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("G", "D", "factor"), [(16, 32, 1), (16, 32, 12), (1, 16, 1), (3, 24, 1), (16, 128, 1)])
def test_selection_error_is_at_most_twice_that_of_the_definition(dtype, G, D, factor):
    torch.manual_seed(0)
    sizes = [1, 70, 512, 3, 64, 200]
    T, M = sum(sizes), len(sizes)
    inputs = [torch.randn(T, n, D, device="cuda").to(dtype) for n in (H * G, H, H)]
    inputs[0] *= factor  # lse beyond 100
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    blocks = torch.rand(T, H, M, device="cuda").topk(3).indices.sort(-1).values.int()
    blocks[0] = -1
    weight = torch.randn(T, H * G, D, device="cuda").to(dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    definition = lambda *x: selection_attention_reference(*x, offsets, blocks, D**-0.5)  # noqa: E731
    exact = outputs_and_gradients(definition, inputs, weight, torch.float64)
    same = outputs_and_gradients(definition, inputs, weight, dtype)
    ours = outputs_and_gradients(lambda *x: selection_attention(*x, offsets, blocks), inputs, weight, dtype)
    for a, s, e in zip(ours, same, exact, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(s, e) + 1e-7


@pytest.mark.parametrize("c", [4, 8])
@pytest.mark.parametrize("num_tokens", [32769, 200000])
def test_many_tokens(num_tokens, c):
    """Compare some queries of a large batch with all three branches, computed for these queries alone in fp64."""
    from d3ds2.kernels.block_scores_triton import select_blocks_triton
    from d3ds2.kernels.ragged_attention_triton import LOG2_E
    from d3ds2.kernels.spatial_sparse_attention_triton import spatial_sparse_attention_triton

    torch.manual_seed(0)
    voxels = surface_voxels(num_tokens, "cuda")
    Nc = len(voxels.coarsen(c)[0])
    shapes = (num_tokens, H * G, D), (num_tokens, H, D), (num_tokens, H, D), (Nc, H, D), (Nc, H, D)
    q, k, v, ck, cv = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    gates = torch.rand(num_tokens, 3, device="cuda")
    branches = attention_plan(voxels, c, 8, 4)
    out = spatial_sparse_attention_triton(q, k, v, ck, cv, gates, branches, 8, D**-0.5)
    rows = torch.randperm(num_tokens, device="cuda")[:64]

    def softmax(keys):  # keys (n, H, D): weights (64, H, G, n) and lse
        scores = torch.einsum("thgd,khd->thgk", q[rows].unflatten(1, (H, G)).double(), keys.double()) * D**-0.5
        return scores.softmax(-1), scores.logsumexp(-1)

    weights, lse = softmax(ck)
    compression = torch.einsum("thgk,khd->thgd", weights, cv.double()).flatten(1, 2)
    blocks_of_keys = torch.empty(Nc, dtype=torch.long, device="cuda")
    blocks_of_keys.scatter_(0, voxels.coarsen(c)[1], voxels.block_of_token)
    scores = torch.zeros(64, H, sum(voxels.block_counts), device="cuda", dtype=torch.double)
    scores.index_add_(2, blocks_of_keys, weights.sum(2))
    all_lse = q.new_zeros(num_tokens, H * G, dtype=torch.float32)
    all_lse[rows] = lse.flatten(1).float()
    chosen = select_blocks_triton(q, ck, all_lse * LOG2_E, branches, 8, D**-0.5)[rows].long()
    best = scores.topk(8, dim=-1).values.sum(-1)
    assert ((scores.gather(2, chosen).sum(-1) - best).abs() < 1e-4 * best).all()
    window_of = torch.empty(num_tokens, dtype=torch.long, device="cuda")
    windows = voxels.windows(4)
    window_of[windows.order] = torch.repeat_interleave(
        torch.arange(len(windows.lengths), device="cuda"), windows.cu_seqlens.diff().long()
    )
    for i, row in enumerate(rows.tolist()):
        parts = [compression[i]]
        selected = (voxels.block_of_token[:, None, None] == chosen[i]).any(-1)  # (N, H)
        for mask in (selected, (window_of == window_of[row])[:, None].expand(-1, H)):
            heads = []
            for h in range(H):
                keys, values = k[mask[:, h], h].double(), v[mask[:, h], h].double()
                s = q[row, h * G : (h + 1) * G].double() @ keys.t() * D**-0.5
                heads.append(s.softmax(-1) @ values)
            parts.append(torch.cat(heads))
        expected = sum(g * part for g, part in zip(gates[row].double(), parts, strict=True))
        assert relative_error(out[row], expected) < 1e-2


@pytest.mark.parametrize(("c", "shift"), [(8, 0), (4, 4)])
def test_fused_branches_match_separate_ones(c, shift):
    """Select all blocks, so that rounding cannot change the selection; the ragged batch has an empty sample."""
    torch.manual_seed(0)
    parts = [surface_voxels(n, "cuda") for n in (1500, 300)]
    empty = Voxels.sort(torch.zeros(0, 4), 64, 1)[0].to("cuda")
    rows = [Voxels.sort(part.coords, 64, 1)[0] for part in parts]
    voxels = Voxels.cat([rows[0], empty, rows[1]])
    N, Nc, top_k = len(voxels), len(voxels.coarsen(c)[0]), max(voxels.block_counts)
    shapes = (N, H * G, D), (N, H, D), (N, H, D), (Nc, H, D), (Nc, H, D)
    inputs = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes] + [torch.rand(N, 3, device="cuda")]
    weight = torch.randn(N, H * G, D, device="cuda").bfloat16()
    from d3ds2.kernels.spatial_sparse_attention_triton import spatial_sparse_attention_triton

    definition = lambda *x: spatial_sparse_attention_reference(*x, attention_plan(voxels, c, 8, shift), top_k)  # noqa: E731
    exact = outputs_and_gradients(definition, inputs, weight, torch.float32)
    same = outputs_and_gradients(definition, inputs, weight, torch.bfloat16)
    branches = attention_plan(voxels, c, 8, shift)
    fused = lambda *x: spatial_sparse_attention_triton(*x, branches, top_k, D**-0.5)  # noqa: E731
    for a, s, e in zip(outputs_and_gradients(fused, inputs, weight, torch.bfloat16), same, exact, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(s, e)


def test_layer_in_a_cuda_graph_is_deterministic():
    torch.manual_seed(0)
    voxels = surface_voxels(5000, "cuda")
    layer = SpatialSparseAttention(H * G * D, H * G, H, 4, True, 4, shift=4).to("cuda", torch.bfloat16)
    x = torch.randn(len(voxels), H * G * D, device="cuda").bfloat16()
    with torch.no_grad():
        expected = layer(x, voxels)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x, voxels)
        out.zero_()
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.02)  # pooling adds in no fixed order


def test_layer_under_torch_compile():
    torch.manual_seed(0)
    voxels = surface_voxels(3000, "cuda")
    for pooled_conv, c in ((True, 4), (False, 8)):
        layer = SpatialSparseAttention(H * G * D, H * G, H, c, pooled_conv, 4).to("cuda", torch.bfloat16)
        x = torch.randn(len(voxels), H * G * D, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn_like(x)
        results = []
        for function in (layer, torch.compile(layer)):
            out = function(x, voxels)
            results.append((out, *torch.autograd.grad(out, (x, *layer.parameters()), weight)))
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < 2e-2
