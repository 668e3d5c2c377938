"""Softmax attention of each token to its neighbours in the packed order, those of its sample.

The tokens are cut into chunks as long as the window reaches, so the keys of a chunk lie in it and in the chunks beside
it. Three chunks of keys under a mask are thus all that a chunk of queries needs.

Sizes named in this file:
    N  tokens, all samples packed      H   query heads           D  channels per head
    s  tokens of a chunk               Hk  key/value heads       n  chunks
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import Ragged


@dataclass(frozen=True, eq=False)
class SlidingWindow:
    """The keys of each token: those of its sample that are at most `reach` places away.

    Args:
        reach: in tokens; also the length s of a chunk.
        visible: (n, 1, s, 3 s) bool, whether a query of a chunk attends to a key of the three chunks around it. Rows
            beyond the last token attend to themselves.
    """

    reach: int
    visible: Tensor

    @classmethod
    def over(cls, samples: Ragged, reach: int) -> "SlidingWindow":
        """Return the window over the tokens of `samples`, which are consecutive."""
        rows = torch.arange(samples.total, dtype=torch.int32, device=samples.offsets.device)
        sample = torch.searchsorted(samples.offsets[1:], rows, right=True)
        padded = F.pad(sample, (0, -samples.total % reach), value=-1).view(-1, reach)  # (n, s)
        around = F.pad(padded.flatten(), (reach, reach), value=-1).unfold(0, 3 * reach, reach)  # (n, 3 s)
        places = torch.arange(3 * reach, device=rows.device)
        distance = places - places[reach : 2 * reach, None]  # (s, 3 s)
        visible = (padded[..., None] == around[:, None]) & (distance.abs() <= reach)
        return cls(reach, visible[:, None])


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, window: SlidingWindow) -> Tensor:
    """Attend within the window: q (N, H, D), k and v (N, Hk, D), Hk dividing H -> (N, H, D)."""
    N, s, groups = len(q), window.reach, q.shape[1] // k.shape[1]
    after = -N % s
    queries = F.pad(q, (0, 0, 0, 0, 0, after)).unflatten(0, (-1, s)).transpose(1, 2)  # (n, H, s, D)
    keys, values = (
        F.pad(x, (0, 0, 0, 0, s, after + s)).unfold(0, 3 * s, s).transpose(2, 3).repeat_interleave(groups, 1)
        for x in (k, v)
    )  # (n, H, 3 s, D)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=window.visible)
    return out.transpose(1, 2).flatten(0, 1)[:N]


def sliding_window_attention_reference(q: Tensor, k: Tensor, v: Tensor, samples: Ragged, reach: int) -> Tensor:
    """Definition of `sliding_window_attention`, quadratic in N."""
    place = torch.arange(len(q), device=q.device)
    sample = torch.searchsorted(samples.offsets[1:], place, right=True)
    visible = (sample[:, None] == sample) & ((place[:, None] - place).abs() <= reach)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    weights = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1)
