"""The definition of attention between segments, which the kernels of ragged_attention_triton.py compute.

Sizes named in this file:
    T   query tokens        H  key/value heads                       D  channels per head
    Tk  keys                G  query heads per key/value head        M  segments of keys
    P   pairs per query row, or 0

A query row is one token in one key/value head, with the G query heads that share it. Segment by segment, the listed
query rows attend to the listed keys: those of a sample to its compressed keys, those of a window to the window, or
those that selected a block to the block.

With P = 0 a list of queries holds tokens, and a segment serves all heads. Otherwise it holds pairs of a query row and
one of P places for the segments the row lies in. Pair (token * H + head) * P + place has its own output, and segment
h * M + m of the queries is of head h.
"""

import torch
from torch import Tensor

from .ragged import AttentionSegments, Ragged


def ragged_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, segments: AttentionSegments, scale: float
) -> tuple[Tensor, Tensor]:
    """Definition of `ragged_attention_forward`; its gradients define `ragged_attention_dq` and `ragged_attention_dkdv`.

    Args:
        q: queries (T, H * G, D).
        k, v: keys and values (Tk, H, D).
        segments: which of them attention pairs.
        scale: factor on the scores.

    Returns:
        out (T, H * G, D), zero without keys, and the base-2 logarithm lse (T, H * G) of the softmax denominators, -inf
        without keys. With pairs (T * H * P, G, D) and (T * H * P, G).
    """
    (H, D), P, M = k.shape[1:], segments.pairs, len(segments.keys)
    rows = q.reshape(len(q) * H, -1, D)  # (T H, G, D)
    out = torch.zeros_like(rows.repeat_interleave(max(1, P), 0))
    lse = torch.full_like(out[..., 0], -torch.inf)
    keys = _lists(segments.keys)
    for segment, ids in enumerate(_lists(segments.queries)):
        for h in [segment // M] if P else range(H):
            row, to = (ids // P, ids) if P else (ids * H + h, ids * H + h)
            j = keys[segment % M]
            scores = torch.einsum("igd,jd->igj", rows[row], k[j, h]) * scale
            out = out.index_copy(0, to, scores.softmax(-1) @ v[j, h])
            lse = lse.index_copy(0, to, scores.logsumexp(-1) / torch.log(scores.new_tensor(2)))
    return (out, lse) if P else (out.view(q.shape), lse.view(q.shape[:2]))


def _lists(rows: Ragged) -> list[Tensor]:
    """The rows of each segment, long."""
    ids = torch.arange(rows.total, device=rows.offsets.device) if rows.ids is None else rows.ids.long()
    return list(ids[: sum(rows.lengths)].split(rows.lengths))
