"""Pairs of a query and a block that it selected, sorted by block: the definition.

A pair is one place in a query's list of selected blocks. Pairs are numbered in the order of `block_indices`: pair
(t * Hk + h) * K + i is place i in the list of token t and head h.

Sizes named in this file:
    T  tokens, all samples packed         Hk  key/value heads
    M  blocks, all samples packed         K   blocks selected per query, padded with -1
"""

import torch
from torch import Tensor


def pairs_by_block(block_indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of each head and block.

    Args:
        block_indices: global ids of the selected blocks (T, Hk, K) int32; -1 is none.
        num_blocks: number of blocks, M.

    Returns:
        `pair_offsets` (Hk * M + 1,) and `pair_ids` (T * Hk * K,), both int32. The pairs of head h and block m are
        pair_ids[pair_offsets[h * M + m] : pair_offsets[h * M + m + 1]], ascending. Places without a block come last.
    """
    Hk, device = block_indices.shape[1], block_indices.device
    first_list = torch.arange(Hk, device=device)[:, None] * num_blocks
    lists = torch.where(block_indices < 0, Hk * num_blocks, first_list + block_indices)  # (T, Hk, K)
    lists, pair_ids = lists.flatten().sort(stable=True)
    pair_offsets = torch.searchsorted(lists, torch.arange(Hk * num_blocks + 1, device=device))
    return pair_offsets.int(), pair_ids.int()
