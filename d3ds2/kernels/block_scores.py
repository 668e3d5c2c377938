"""The blocks that each query selects (eq. 8).

The score of a block is the attention it draws in the compression branch: the softmax probabilities of its compressed
tokens, summed over these tokens and over the query heads that share a key/value head. Each query selects the `top_k`
blocks of its own sample with the highest scores. The choice carries no gradient.

Sizes named in this file:
    T   tokens, all samples packed              H   query heads           D  channels per head
    Tc  compressed tokens, all samples packed   Hk  key/value heads       G  query heads per key/value head, H / Hk
    M   selection blocks of one sample          K   selected blocks, top_k
"""

import torch
from torch import Tensor

from .devices import without_autocast

_CPU_PROBABILITIES = 1 << 22  # held at once
_GPU_PROBABILITIES = 1 << 25


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
    """Return the `top_k` best blocks for each query and key/value head.

    Args:
        q: queries (T, H, D).
        compressed_k: compressed keys (Tc, Hk, D); Hk divides H.
        lse: natural logsumexp of each query's scores over the compressed keys of its sample, (T, H) float32.
        block_of_compressed: global id of each compressed token's selection block, (Tc,) long.
        counts, compressed_counts, block_counts: tokens, compressed tokens and blocks of each sample, on the host.
        top_k: blocks to select, K.
        scale: factor on the scores. Default: 1 / sqrt(D).

    Returns:
        Global block ids (T, Hk, K) int32, ascending, padded at the end with -1 where a sample has fewer than K blocks.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    (Tc, Hk, D), H = compressed_k.shape, q.shape[1]
    if q.shape[2] != D or H % Hk or lse.shape != q.shape[:2] or block_of_compressed.shape != (Tc,):
        raise ValueError(
            "expected q (T, H, D), compressed_k (Tc, Hk, D), Hk dividing H, lse (T, H), block_of_compressed (Tc,), got "
            f"{tuple(q.shape)}, {tuple(compressed_k.shape)}, {tuple(lse.shape)}, {tuple(block_of_compressed.shape)}"
        )
    scale = D**-0.5 if scale is None else scale
    block_indices = torch.full((len(q), Hk, top_k), -1, dtype=torch.int32, device=q.device)
    probabilities = _CPU_PROBABILITIES if q.is_cpu else _GPU_PROBABILITIES
    first = first_compressed = first_block = 0
    for T, T_compressed, M in zip(counts, compressed_counts, block_counts, strict=True):
        keys = compressed_k[first_compressed : first_compressed + T_compressed]
        block_of_key = block_of_compressed[first_compressed : first_compressed + T_compressed] - first_block
        rows = max(1, probabilities // max(1, T_compressed * H))
        for start in range(first, first + T, rows):
            chunk = slice(start, min(start + rows, first + T))
            with without_autocast(q.device):  # lse is that of fp32 scores
                scores = block_scores(q[chunk], keys, lse[chunk], block_of_key, M, scale)  # (rows, Hk, M)
            best = scores.topk(min(top_k, M), dim=-1, sorted=False).indices.sort(dim=-1).values
            block_indices[chunk, :, : best.shape[-1]] = (best + first_block).int()
        first, first_compressed, first_block = first + T, first_compressed + T_compressed, first_block + M
    return block_indices


def block_scores(q: Tensor, keys: Tensor, lse: Tensor, block_of_key: Tensor, num_blocks: int, scale: float) -> Tensor:
    """Return the scores of the blocks of one sample, (T, Hk, M): the definition.

    Args:
        q: queries (T, H, D).
        keys: compressed keys (Tc, Hk, D).
        lse: natural logsumexp of each query's scores, (T, H).
        block_of_key: number of each key's block within the sample, (Tc,).
        num_blocks: blocks of the sample, M.
        scale: factor on the scores.
    """
    T, (Tc, Hk) = len(q), keys.shape[:2]
    queries = torch.cat([q.float() * scale, lse[..., None]], dim=2)  # (T, H, D + 1)
    queries = queries.unflatten(1, (Hk, -1)).permute(1, 3, 2, 0).flatten(2)  # (Hk, D + 1, G T)
    keys = torch.nn.functional.pad(keys.float(), (0, 1), value=-1.0).movedim(1, 0)  # (Hk, Tc, D + 1)
    probabilities = (keys @ queries).exp_()  # the product subtracts lse: exp(logits) / exp(lse) would overflow
    per_key = probabilities.view(Hk, Tc, -1, T).sum(2)  # over the heads of a group: (Hk, Tc, T)
    return per_key.new_zeros(Hk, num_blocks, T).index_add_(1, block_of_key, per_key).permute(2, 0, 1)
