"""Spatial blockwise selection attention (Direct3D-S2, section 4.1, Algorithm 1).

Each query attends to all tokens of the blocks selected for it. A block is a cube of voxels, so blocks hold different
numbers of tokens. Tokens are sorted by block, and `block_offsets` says where each block begins. Block ids count through
the whole packed batch, so the lengths of the samples are not needed.

Sizes named in this file:
    T  tokens, all samples packed         H   query heads           D  channels per head
    M  blocks, all samples packed         Hk  key/value heads       G  query heads per key/value head, H / Hk
    K  blocks selected per query, padded with -1

Here are the public function, its definition, and the form for devices without Triton, which goes from block to block.
The kernels are in selection_attention_triton.py.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import on_triton, without_autocast
from .pair_order import pairs_by_block

_CACHED_SCORES = 1 << 19  # held at once on devices without Triton: 2 MiB, which stay in the cache


def selection_attention(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float | None = None
) -> Tensor:
    """Return the attention of each query to every token of the blocks selected for it.

    Args:
        q: queries (T, H, D).
        k, v: keys and values (T, Hk, D), sorted by block; Hk divides H.
        block_offsets: first token of each block and, last, T: (M + 1,) int32.
        block_indices: global ids of the blocks selected for each token and key/value head (T, Hk, K) int32; -1 is
            none. A query has no block twice.
        scale: factor on the scores. Default: 1 / sqrt(D).

    Returns:
        (T, H, D). A query without any block gets zeros. Differentiable in q, k and v, in memory linear in T.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    (T, Hk, D), H = k.shape, q.shape[1]
    if v.shape != k.shape or q.shape[0] != T or q.shape[2] != D or H % Hk:
        raise ValueError(
            f"expected q (T, H, D), k and v (T, Hk, D), Hk dividing H, got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if block_indices.ndim != 3 or block_indices.shape[:2] != (T, Hk):
        raise ValueError(f"expected block_indices ({T}, {Hk}, K), got {tuple(block_indices.shape)}")
    scale = D**-0.5 if scale is None else scale
    if on_triton(q):
        from .selection_attention_triton import selection_attention_triton

        return selection_attention_triton(q, k, v, block_offsets, block_indices, scale)
    with without_autocast(q.device):  # the form below chooses its own dtype
        return _SelectionAttention.apply(q, k, v, block_offsets, block_indices, scale)


def selection_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float
) -> Tensor:
    """The definition of `selection_attention`: dense attention under a mask (T, T), quadratic in T."""
    T, Hk = k.shape[:2]
    M = block_offsets.numel() - 1
    block_of_token = torch.repeat_interleave(torch.arange(M, device=k.device), block_offsets.diff())  # (T,)
    is_selected = torch.zeros(T, Hk, M + 1, dtype=torch.bool, device=k.device)  # the last column is for -1
    is_selected.scatter_(2, torch.where(block_indices < 0, M, block_indices).long(), True)
    mask = is_selected[..., block_of_token].movedim(1, 0)[:, None]  # (Hk, 1, T, T)
    scores = torch.einsum("thgd,shd->hgts", q.unflatten(1, (Hk, -1)), k) * scale  # (Hk, G, T, T)
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)  # NaN without any block
    return torch.einsum("hgts,shd->thgd", weights.to(v.dtype), v).flatten(1, 2)


class _SelectionAttention(torch.autograd.Function):
    """The form without Triton: goes from block to block, with a running softmax for each query.

    Each step multiplies the tokens of a block with the queries that selected it. Scores are (tokens, queries * G): with
    the tokens first, the maximum over them is one over whole rows, which is fast.
    """

    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale):
        (T, Hk, D), G = k.shape, q.shape[1] // k.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        pieces = _pieces(block_offsets, block_indices, G)
        out = torch.empty_like(q).view(T, Hk, G * D)
        lse = torch.empty(Hk, T, G, dtype=dtype, device=q.device)
        for h in range(Hk):
            queries = q[:, h * G : (h + 1) * G].to(dtype).reshape(T, G * D) * scale
            keys, values = k[:, h].to(dtype), v[:, h].to(dtype)
            numerator = torch.zeros(T, G * D, dtype=dtype, device=q.device)
            denominator = torch.zeros(T, G, dtype=dtype, device=q.device)
            top = torch.full((T, G), -math.inf, dtype=dtype, device=q.device)
            for tokens, ids in pieces[h]:
                scores = keys[tokens] @ queries.index_select(0, ids).view(-1, D).t()
                old_top = top.index_select(0, ids)
                new_top = torch.maximum(old_top, scores.amax(0).view(-1, G))
                weights = scores.sub_(new_top.view(-1)).exp_()
                decay = (old_top - new_top).exp_()
                partial = (weights.t() @ values[tokens]).view(-1, G, D)
                partial.addcmul_(numerator.index_select(0, ids).view(-1, G, D), decay[..., None])
                numerator.index_copy_(0, ids, partial.flatten(1))
                total = weights.sum(0).view(-1, G).addcmul_(denominator.index_select(0, ids), decay)
                denominator.index_copy_(0, ids, total)
                top.index_copy_(0, ids, new_top)
            has_keys = denominator > 0  # without any block, the output is 0, and an lse of +inf makes the gradients 0
            out[:, h] = (numerator.view(T, G, D) / denominator.masked_fill(~has_keys, 1.0)[..., None]).flatten(1)
            lse[h] = (top + denominator.log()).masked_fill(~has_keys, math.inf)
        out = out.view(T, Hk * G, D)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        (T, Hk, D), G, dtype = k.shape, q.shape[1] // k.shape[1], lse.dtype
        dq = torch.empty_like(q).view(T, Hk, G * D)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for h in range(Hk):
            heads = slice(h * G, (h + 1) * G)
            queries = q[:, heads].to(dtype).reshape(T, G * D) * ctx.scale
            douts = dout[:, heads].to(dtype).reshape(T, G * D)
            delta = (out[:, heads].to(dtype) * dout[:, heads].to(dtype)).sum(-1)  # (T, G)
            keys, values = k[:, h].to(dtype), v[:, h].to(dtype)
            dqueries = torch.zeros_like(queries)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for tokens, ids in ctx.pieces[h]:
                rows, drows = queries.index_select(0, ids).view(-1, D), douts.index_select(0, ids).view(-1, D)
                weights = (keys[tokens] @ rows.t()).sub_(lse[h].index_select(0, ids).view(-1)).exp_()
                dvalues[tokens].addmm_(weights, drows)
                dscores = (values[tokens] @ drows.t()).sub_(delta.index_select(0, ids).view(-1)).mul_(weights)
                dkeys[tokens].addmm_(dscores, rows)
                dqueries.index_add_(0, ids, (dscores.t() @ keys[tokens]).view(-1, G * D))
            dq[:, h] = dqueries * ctx.scale
            dk[:, h], dv[:, h] = dkeys, dvalues
        return dq.view(T, Hk * G, D), dk, dv, None, None, None


def _pieces(block_offsets: Tensor, block_indices: Tensor, G: int) -> list[list[tuple[slice, Tensor]]]:
    """Return for each head the pieces of work: the tokens of a block, and queries that selected it.

    The queries are split so that a piece has at most `_CACHED_SCORES` scores.
    """
    M, (Hk, K) = block_offsets.numel() - 1, block_indices.shape[1:]
    pair_offsets, pair_ids = pairs_by_block(block_indices, M)
    offsets, pair_offsets = block_offsets.tolist(), pair_offsets.tolist()
    lengths = [last - first for first, last in pairwise(pair_offsets)]
    selected = (pair_ids[: pair_offsets[-1]].long() // (Hk * K)).split(lengths)  # queries
    return [
        [
            (slice(offsets[m], offsets[m + 1]), ids)
            for m in range(M)
            if len(selected[h * M + m]) and offsets[m + 1] > offsets[m]
            for ids in selected[h * M + m].split(max(1, _CACHED_SCORES // (G * (offsets[m + 1] - offsets[m]))))
        ]
        for h in range(Hk)
    ]
