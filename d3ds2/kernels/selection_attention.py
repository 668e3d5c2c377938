"""Spatial blockwise selection attention (Direct3D-S2, section 4.1, Algorithm 1).

Every query token attends to all tokens inside the blocks selected for it. Blocks are
cubes of voxels, so they hold a varying number of tokens; tokens are sorted by block and
`block_offsets` says where each block begins. Block ids are global over the batch, so a
packed batch needs no sequence lengths here.

Shapes (these capital letters name the sizes in both files):
    T  tokens, all samples packed         H  key/value heads       D  channels per head
    M  blocks, all samples packed         G  query heads per key/value head (GQA)
    S  blocks selected per query, padded with -1

The public function and its definition in PyTorch. Where Triton does not run: selection_attention_batched.py.
The kernels: selection_attention_triton.py.
"""

import torch
from torch import Tensor

from .devices import on_triton
from .selection_attention_batched import selection_attention_batched


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
