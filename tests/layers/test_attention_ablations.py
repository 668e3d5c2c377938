"""The attentions of the ablations against a few lines of torch, in double precision."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from d3ds2.geometry.token_runs import RUN, token_runs
from d3ds2.geometry.voxels import Voxels
from d3ds2.layers.full_attention import FullAttention
from d3ds2.layers.spatial_sparse_attention import BRANCHES, SpatialSparseAttention
from d3ds2.layers.token_packing import ModulatedResBlock, TokenPacking
from tests.support.random_voxels import random_voxels

C, H, HK = 16, 4, 2
SUBSETS = [("window",), ("compression", "window"), BRANCHES, ("compression", "selection"), ("compression",)]


def randomized(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def heads(x, D):
    return x.unflatten(-1, (-1, D)).transpose(0, 1)  # (heads, N, D)


def attend(q, k, v, visible=None):
    """Dense attention of q (H, N, D) to k and v (Hk, ·, D), under a mask that broadcasts to (Hk, 1, N, ·)."""
    scores = torch.einsum("hgnd,hmd->hgnm", q.unflatten(0, (len(k), -1)), k) * q.shape[2] ** -0.5
    weights = (scores if visible is None else scores.masked_fill(~visible, -torch.inf)).softmax(-1)
    return torch.einsum("hgnm,hmd->hgnd", weights, v).flatten(0, 1), weights


def of_one_sample(module, x, cell, place, block, visible, branches):
    """Equations 6 to 8 for x (N, C): cell and block of each token, place in its cell, tokens (N, N) in its window."""
    D = module.head_dim
    q, k, v = (heads(project(x), D) for project in (module.to_q, module.to_k, module.to_v))
    outputs = []
    if "compression" in branches:
        member = F.one_hot(cell).double().T  # (Nc, N)
        with_place = module.to_k(x) + module.block_position[place]
        compressed = [
            heads(member @ F.silu(compress.pointwise(rows)) / (member.sum(1, keepdim=True) + 1), D)
            for compress, rows in ((module.compress_k, with_place), (module.compress_v, module.to_v(x)))
        ]
        out, weights = attend(q, *compressed)
        outputs.append(out)
    if "selection" in branches:
        block_of_cell = torch.stack([block[cell == c][0] for c in range(len(member))])
        scores = weights.sum(1) @ F.one_hot(block_of_cell).double()  # (Hk, N, M)
        best = scores.topk(min(module.top_k, scores.shape[2])).indices
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True)
        outputs.append(attend(q, k, v, selected[..., block][:, None])[0])
    if "window" in branches:
        outputs.append(attend(q, k, v, visible)[0])
    gates = module.gate(x).sigmoid().T[:, None, :, None]  # (branches, 1, N, 1)
    return module.to_out(sum(gate * out for gate, out in zip(gates, outputs, strict=True)).transpose(0, 1).flatten(1))


def numbered(rows):
    return torch.unique(rows, dim=0, return_inverse=True)[1]


@pytest.mark.parametrize("c", [4, 8])
@pytest.mark.parametrize("branches", SUBSETS, ids="+".join)
@pytest.mark.parametrize("in_sequence", [False, True], ids=["spatial", "sequence"])
def test_branches_are_their_definition(c, branches, in_sequence):
    voxels = random_voxels([150, 0, 90], 16)
    module = randomized(SpatialSparseAttention(C, H, HK, c, False, 2, 4, 2, branches=branches, in_sequence=in_sequence))
    x = torch.randn(len(voxels), C, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    expected = []
    for xyz, rows in zip(voxels.coords[:, 1:].split(voxels.counts), x.split(voxels.counts), strict=True):
        n = torch.arange(len(rows))
        if in_sequence:
            tokens = {4: 16, 8: 64}[c]
            cell, place, block = n // tokens, n % tokens, n // 64
            if c == 8:  # the table has 8³ rows, of which 64 are in use
                place = place // 32 * 256 + place // 4 % 8 * 8 + place % 4
            visible = (n[:, None] - n).abs() <= 8
        else:
            cell, block, window = (numbered((xyz + shift) // edge) for edge, shift in ((c, 0), (8, 0), (4, 2)))
            place = (xyz % c).long() @ torch.tensor([c * c, c, 1])
            visible = window[:, None] == window
        expected.append(of_one_sample(module, rows, cell, place, block, visible, branches) if len(rows) else rows)
    results = []
    for out in (module(x, voxels), torch.cat(expected)):
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], direction)])
    for fast, definition in zip(*results, strict=True):
        torch.testing.assert_close(fast, definition)


def test_branches_left_out_have_no_parameters():
    names = {
        branches: {name.partition(".")[0] for name, _ in SpatialSparseAttention(
            C, H, HK, 8, False, 2, branches=branches
        ).named_parameters()}
        for branches in SUBSETS
    }  # fmt: skip
    compression = {"block_position", "compress_k", "compress_v"}
    assert names["window",] == {"to_q", "to_k", "to_v", "to_out", "gate"}
    assert all(names[branches] == names["window",] | compression for branches in SUBSETS[1:])
    for branches in SUBSETS:
        assert SpatialSparseAttention(C, H, HK, 8, False, 2, branches=branches).gate.out_features == len(branches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": ()}, "expected branches among"),
        ({"branches": ("window", "compression")}, "in this order, got window, compression"),
        ({"branches": ("selection", "window")}, "compression beside selection"),
        ({"compression_block": 2, "in_sequence": True}, "compression_block of 4 or 8"),
        ({"pooled_conv": True, "in_sequence": True}, "without pooled_conv"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    sizes = {"compression_block": 8, "pooled_conv": False, "top_k": 2}
    with pytest.raises(ValueError, match=message):
        SpatialSparseAttention(C, H, HK, **sizes | arguments)


def test_runs_of_tokens_stand_in_the_order_of_the_tokens():
    voxels = random_voxels([200, 0, 64, 1], 16)
    runs = token_runs(voxels)
    Voxels(runs.coords, runs.resolution, runs.batch_size)  # sorted, without repeats
    number = torch.cat([torch.arange(count) for count in voxels.counts])
    for factor, tokens in ((8, RUN), (4, RUN // 4)):
        parts = torch.stack([voxels.batch_index, number // tokens], dim=1)
        same, cells = numbered(parts), runs.coarsen(factor)[1]
        assert torch.equal(same[:, None] == same, cells[:, None] == cells)
    assert runs.block_counts == [4, 0, 1, 1] and runs.counts == voxels.counts


def test_full_attention_is_dense_attention_of_each_sample():
    voxels, module = random_voxels([40, 0, 25], 16), randomized(FullAttention(C, H, HK))
    x = torch.randn(len(voxels), C, dtype=torch.float64)
    for rows, out in zip(x.split(voxels.counts), module(x, voxels).split(voxels.counts), strict=True):
        q, k, v = (heads(project(rows), C // H) for project in (module.to_q, module.to_k, module.to_v))
        torch.testing.assert_close(out, module.to_out(attend(q, k, v)[0].transpose(0, 1).flatten(1)))


def dense_conv(conv, x, voxels):
    """A 3³ convolution of the dense grid, read at the voxels."""
    b, x_, y, z = voxels.coords.long().unbind(1)
    grid = x.new_zeros(voxels.batch_size, *[voxels.resolution] * 3, x.shape[1])
    grid[b, x_, y, z] = x
    weight = conv.weight.unflatten(0, (3, 3, 3)).permute(4, 3, 0, 1, 2)
    return F.conv3d(grid.movedim(-1, 1), weight, conv.bias, padding=1).movedim(1, -1)[b, x_, y, z]


def res_block(block: ModulatedResBlock, x, voxels, embedding):
    scale, shift = block.modulation(embedding)[voxels.batch_index].chunk(2, dim=1)
    h = dense_conv(block.conv_in, F.silu(block.norm_in(x)), voxels)
    h = F.layer_norm(h, h.shape[1:], eps=1e-6) * (1 + scale) + shift
    return dense_conv(block.conv_out, F.silu(h), voxels) + block.skip(x)


def test_packing_is_its_definition():
    voxels, packing = random_voxels([40, 25], 8), randomized(TokenPacking(6, C))
    x, embedding = torch.randn(65, 6, dtype=torch.float64), torch.randn(2, C, dtype=torch.float64)
    tokens, made = packing.pack(x, voxels, embedding)
    coarse, parent = voxels.coarsen(2)
    fine = res_block(packing.fine_in, x, voxels, embedding)
    pooled = torch.zeros(len(coarse), 6, dtype=torch.float64).index_add(0, parent, fine)
    pooled = pooled / (torch.bincount(parent)[:, None] + 1)
    torch.testing.assert_close(tokens, res_block(packing.coarse_in, pooled, coarse, embedding))
    h = torch.randn_like(tokens)
    spread = torch.cat([h, tokens], dim=1)[parent]
    expected = torch.cat([res_block(packing.fine_out, spread, voxels, embedding), fine], dim=1)
    expected = res_block(packing.last, expected, voxels, embedding)
    torch.testing.assert_close(packing.unpack(h, made, voxels, embedding), expected)


def test_packing_starts_as_a_linear_map():
    voxels, packing = random_voxels([40], 8), TokenPacking(6, C)
    packing.initialize()
    x, embedding = torch.randn(40, 6), torch.randn(1, C)
    (tokens, (fine, _)), twice = packing.pack(x, voxels, embedding), packing.pack(2 * x, voxels, embedding)[0]
    assert torch.equal(fine, x)
    bias = packing.coarse_in.skip.bias
    torch.testing.assert_close(twice - bias, 2 * (tokens - bias))


def test_tokens_of_a_pack_share_a_cube():
    places = torch.tensor(list(itertools.product([0], range(4), range(4), range(4))))
    voxels, packing = Voxels.sort(places, 8)[0], TokenPacking(6, C)
    assert len(packing.pack(torch.randn(64, 6), voxels, torch.randn(1, C))[0]) == 8
