"""Gradients of keys and values from the pairs of a query and a block that it selected: the definition.

Sizes named in this file:
    T  tokens, all samples packed         H   query heads          D  channels per head
    M  blocks, all samples packed         Hk  key/value heads      K  blocks selected per query
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .ragged import AttentionSegments


def pair_dkdv_reference(
    q: Tensor, k: Tensor, v: Tensor, segments: AttentionSegments, stats: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v, (T, Hk, D) float32.

    Args:
        q: queries (T, H, D).
        k, v: keys and values (T, Hk, D), sorted by block.
        segments: Hk * M segments of pairs, as from `pairs_by_block`, and M segments of keys.
        stats: lse in base 2, and the sum of out * dout over D, of each row of q: (T, H, 2) float32.
        dout: gradient of the output, (T, H, D).
        scale: factor on the scores.
    """
    Hk, pairs, key_edges = k.shape[1], segments.queries, segments.keys.offsets.tolist()
    assert pairs.ids is not None  # pairs are always listed
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    rows = [x.unflatten(1, (Hk, -1)).flatten(0, 1).float() for x in (q, dout, stats)]  # each (T * Hk, H / Hk, ...)
    for segment, (first, last) in enumerate(pairwise(pairs.offsets.tolist())):
        h, m = divmod(segment, len(segments.keys))
        own = slice(key_edges[m], key_edges[m + 1])
        rows_of_pairs = pairs.ids[first:last].long() // segments.pairs  # t * Hk + h
        queries, douts, statistics = (x[rows_of_pairs].flatten(0, 1) for x in rows)
        lse, delta = statistics.unbind(-1)
        weights = torch.exp2(k[own, h].float() @ queries.t() * (scale * math.log2(math.e)) - lse)
        dv[own, h] = weights @ douts
        dk[own, h] = (weights * (v[own, h].float() @ douts.t() - delta)) @ queries * scale
    return dk, dv
