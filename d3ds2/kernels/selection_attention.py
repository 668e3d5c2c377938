"""Spatial blockwise selection attention (Direct3D-S2, section 4.1, Algorithm 1).

Each query attends to all tokens of the blocks selected for it. A block is a cube of voxels, so blocks hold different
numbers of tokens. Tokens are sorted by block, and `block_offsets` says where each block begins. Block ids count through
the whole packed batch, so the lengths of the samples are not needed.

Sizes named in this file:
    T  tokens, all samples packed         H   query heads           D  channels per head
    M  blocks, all samples packed         Hk  key/value heads       G  query heads per key/value head, H / Hk
    K  blocks selected per query, padded with -1

Here are the public function and its definition. The kernels are in selection_attention_triton.py; where Triton does not
run, selection_attention_batched.py does the work.
"""

import torch
from torch import Tensor

from .devices import on_triton
from .selection_attention_batched import selection_attention_batched


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
    return selection_attention_batched(q, k, v, block_offsets, block_indices, scale)


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
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)  # NaN without any block
    return torch.einsum("hgts,shd->thgd", weights.to(v.dtype), v).flatten(1, 2)
