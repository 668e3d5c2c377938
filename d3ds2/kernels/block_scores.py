"""Which selection blocks each query attends to (eq. 8).

The score of a block is the attention it draws in the compression branch: the softmax probabilities of its compressed
tokens, summed over them and over the query heads that share a key/value head. The best `top_k` blocks of the query's
own sample are selected. No gradient flows through the choice.

Shapes (these capital letters name the sizes):
    T  tokens, all samples packed              H  key/value heads       D  channels per head
    Tc compressed tokens, all samples packed   G  query heads per key/value head
    M  selection blocks of one sample          K  top_k
"""

import torch
from torch import Tensor

_CPU_ELEMENTS = 1 << 20  # probabilities held at once
_DEVICE_ELEMENTS = 1 << 27


@torch.no_grad()
def select_blocks(
    q: Tensor,
    compressed_k: Tensor,
    lse: Tensor,
    block_of_compressed: Tensor,
    counts: list[int],
    compressed_counts: list[int],
    block_counts: list[int],
    top_k: int,
    scale: float | None = None,
) -> Tensor:
    """The `top_k` best blocks for each query and key/value head.

    Args:
        q: queries (T, H * G, D).
        compressed_k: compressed keys (Tc, H, D).
        lse: natural logsumexp of each query's scores over the compressed keys of its sample, (T, H * G) float32.
        block_of_compressed: selection block of each compressed token, ids global over the batch, (Tc,) long.
        counts, compressed_counts, block_counts: tokens, compressed tokens and blocks of each sample, on the host.
        top_k: blocks to select, K.
        scale: factor on the scores. Default: 1 / sqrt(D).

    Returns:
        Global block ids (T, H, K) int32, ascending, padded at the end with -1 where a sample has fewer blocks.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    (Tc, H, D), Hq = compressed_k.shape, q.shape[1]
    if q.shape[2] != D or Hq % H or lse.shape != q.shape[:2] or block_of_compressed.shape != (Tc,):
        raise ValueError(
            f"expected q (T, H * G, D), compressed_k (Tc, H, D), lse (T, H * G), block_of_compressed (Tc,), got "
            f"{tuple(q.shape)}, {tuple(compressed_k.shape)}, {tuple(lse.shape)}, {tuple(block_of_compressed.shape)}"
        )
    scale = D**-0.5 if scale is None else scale
    block_indices = torch.full((len(q), H, top_k), -1, dtype=torch.int32, device=q.device)
    max_elements = _DEVICE_ELEMENTS if q.is_cuda else _CPU_ELEMENTS
    first = first_compressed = first_block = 0
    for T, T_compressed, M in zip(counts, compressed_counts, block_counts, strict=True):
        keys = compressed_k[first_compressed : first_compressed + T_compressed]
        block_of_key = block_of_compressed[first_compressed : first_compressed + T_compressed] - first_block
        rows = max(1, max_elements // max(1, T_compressed * Hq))
        for start in range(first, first + T, rows):
            chunk = slice(start, min(start + rows, first + T))
            with torch.autocast(q.device.type, enabled=False):  # probabilities of fp32 scores, as lse is
                scores = block_scores(q[chunk], keys, lse[chunk], block_of_key, M, scale)  # (t, H, M)
            best = scores.topk(min(top_k, M), dim=-1, sorted=False).indices.sort(dim=-1).values
            block_indices[chunk, :, : best.shape[-1]] = (best + first_block).int()
        first, first_compressed, first_block = first + T, first_compressed + T_compressed, first_block + M
    return block_indices


def block_scores(q: Tensor, keys: Tensor, lse: Tensor, block_of_key: Tensor, num_blocks: int, scale: float) -> Tensor:
    """The definition, for one sample: q (T, H * G, D), keys (Tc, H, D), block_of_key (Tc,) -> scores (T, H, M)."""
    T, (Tc, H) = len(q), keys.shape[:2]
    queries = q.unflatten(1, (H, -1)).permute(1, 3, 2, 0).float() * scale  # (H, D, G, T)
    logits = keys.movedim(1, 0).float() @ queries.flatten(2)  # (H, Tc, G T)
    probabilities = logits.sub_(lse.unflatten(1, (H, -1)).permute(1, 2, 0).reshape(H, 1, -1)).exp_()  # lse > 88 is fine
    per_key = probabilities.view(H, Tc, -1, T).sum(2)  # over the heads of the group
    return per_key.new_zeros(H, num_blocks, T).index_add_(1, block_of_key, per_key).permute(2, 0, 1)
