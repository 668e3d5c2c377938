"""Spatial blockwise selection attention (Direct3D-S2, section 4.1, Algorithm 1).

Every query token attends to all tokens inside the blocks selected for it. Blocks are
cubes of voxels, so they hold a varying number of tokens; tokens are sorted by block and
`block_offsets` says where each block begins. Block ids are global over the batch, so a
packed batch needs no sequence lengths here.

Shapes (these capital letters name the sizes in both files):
    T  tokens, all samples packed         H  key/value heads       D  channels per head
    M  blocks, all samples packed         G  query heads per key/value head (GQA)
    S  blocks selected per query, padded with -1

The public function, its definition in PyTorch, and the form for devices without Triton, which goes block by block.
The kernels: selection_attention_triton.py.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import on_triton
from .selection_attention_batched import selection_attention_batched

_SCORE_ELEMENTS = 1 << 19  # scores held at once by the form that goes block by block: 2 MiB, what stays in the cache


def selection_attention(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float | None = None
) -> Tensor:
    """Attend from each query to every token of the blocks selected for it.

    Args:
        q: queries, (T, H * G, D).
        k: keys, (T, H, D). Tokens are sorted by block.
        v: values, (T, H, D).
        block_offsets: first token of each block and, last, T, (M + 1,), int32.
        block_indices: global ids of the selected blocks per token and key/value head, (T, H, S), int32, -1 is none;
            no block twice for one query.
        scale: factor on the scores. Default: 1 / sqrt(D).

    Returns:
        Attention outputs, (T, H * G, D). A query without any block gets zeros.
        Differentiable in q, k and v, in memory linear in T.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    (T, H, D), Hq = k.shape, q.shape[1]
    if v.shape != k.shape or q.shape[0] != T or q.shape[2] != D or Hq % H:
        raise ValueError(
            f"expected q (T, H * G, D), k and v (T, H, D), got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if block_indices.ndim != 3 or block_indices.shape[:2] != (T, H):
        raise ValueError(f"expected block_indices ({T}, {H}, S), got {tuple(block_indices.shape)}")
    scale = D**-0.5 if scale is None else scale
    if on_triton(q):
        from .selection_attention_triton import selection_attention_triton

        return selection_attention_triton(q, k, v, block_offsets, block_indices, scale)
    return selection_attention_batched(q, k, v, block_offsets, block_indices, scale)


def selection_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float
) -> Tensor:
    """The definition: dense attention under a mask, quadratic in T."""
    T, H = k.shape[:2]
    M = block_offsets.numel() - 1
    block_of_token = torch.repeat_interleave(torch.arange(M, device=k.device), block_offsets.diff())  # (T,)
    is_selected = torch.zeros(T, H, M + 1, dtype=torch.bool, device=k.device)  # the last column takes the -1
    is_selected.scatter_(2, torch.where(block_indices < 0, M, block_indices).long(), True)
    mask = is_selected[..., block_of_token].movedim(1, 0)[:, None]  # (H, 1, T, T)
    scores = torch.einsum("thgd,shd->hgts", q.unflatten(1, (H, -1)), k) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)  # no block: output 0
    return torch.einsum("hgts,shd->thgd", weights.to(v.dtype), v).flatten(1, 2)


def queries_by_block(block_indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Invert the selection: for each head and block, the queries which selected it.

    Returns `query_offsets` (H * M + 1,) and `query_ids` (T * H * S,), both int32. The queries of head h and block m are
    query_ids[query_offsets[h * M + m] : query_offsets[h * M + m + 1]], ascending; those of the -1 stand at the end.
    """
    (H, S), device = block_indices.shape[1:], block_indices.device
    head = torch.arange(H, device=device)[:, None]
    key = torch.where(block_indices < 0, H * num_blocks, head * num_blocks + block_indices)  # (T, H, S)
    key, order = key.flatten().sort(stable=True)
    query_offsets = torch.searchsorted(key, torch.arange(H * num_blocks + 1, device=device))
    return query_offsets.int(), (order // (H * S)).int()


class _SelectionAttention(torch.autograd.Function):
    """Block by block: matrix products of a block's tokens with the queries that selected it, softmax kept running.

    The scores stand keys first, (tokens of the block, queries * G), so that the maximum over keys is a maximum of rows.
    """

    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale):
        (T, H, D), G = k.shape, q.shape[1] // k.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        pieces = _pieces(block_offsets, block_indices, G)
        out = torch.empty_like(q).view(T, H, G * D)
        lse = torch.empty(H, T, G, dtype=dtype, device=q.device)
        for h in range(H):
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
            has_keys = denominator > 0  # a query without any block: zeros, and an lse of +inf makes its gradients zero
            out[:, h] = (numerator.view(T, G, D) / denominator.masked_fill(~has_keys, 1.0)[..., None]).flatten(1)
            lse[h] = (top + denominator.log()).masked_fill(~has_keys, math.inf)
        out = out.view(T, H * G, D)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        (T, H, D), G, dtype = k.shape, q.shape[1] // k.shape[1], lse.dtype
        dq = torch.empty_like(q).view(T, H, G * D)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for h in range(H):
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
        return dq.view(T, H * G, D), dk, dv, None, None, None


def _pieces(block_offsets: Tensor, block_indices: Tensor, G: int) -> list[list[tuple[slice, Tensor]]]:
    """For each head (tokens of a block, queries that selected it), cut to at most `_SCORE_ELEMENTS` scores."""
    M, H = block_offsets.numel() - 1, block_indices.shape[1]
    query_offsets, query_ids = queries_by_block(block_indices, M)
    offsets, query_offsets = block_offsets.tolist(), query_offsets.tolist()
    lengths = [last - first for first, last in pairwise(query_offsets)]
    selected = query_ids[: query_offsets[-1]].long().split(lengths)
    return [
        [
            (slice(offsets[m], offsets[m + 1]), ids)
            for m in range(M)
            if len(selected[h * M + m]) and offsets[m + 1] > offsets[m]
            for ids in selected[h * M + m].split(max(1, _SCORE_ELEMENTS // (G * (offsets[m + 1] - offsets[m]))))
        ]
        for h in range(H)
    ]
