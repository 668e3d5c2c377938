"""Softmax attention over packed samples of different lengths.

Sizes named in this file:
    Tq, Tk  queries and keys, all segments packed      H  query heads        G  query heads per key/value head, H / Hk
    S       segments                                   Hk key/value heads    D  channels per head

A packed batch is cut into segments: samples, or attention windows. `cu_seqlens` (S + 1,) int32 on the device says where
each begins, `lengths` on the host how long each is. The queries of a segment attend to all keys of the segment with the
same number. A query whose segment has no key gets zeros.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import flash_takes, is_half, on_triton
from .kept import Kept
from .packed_attention_batched import packed_attention_batched

NARROW, WIDEST = 32, 128  # channels per head
_LSE_ELEMENTS = 1 << 24  # scores held at once where no kernel returns the logsumexp


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Compute softmax(q kᵀ · scale) v within each segment (eq. 4-5).

    Args:
        q: queries (Tq, H, D).
        k, v: keys and values (Tk, Hk, D) of the dtype of q; Hk divides H.
        cu_seqlens_q, cu_seqlens_k: first row of each segment and, last, Tq or Tk, (S + 1,) int32.
        lengths_q, lengths_k: rows of each segment, on the host; zero is allowed.
        scale: factor on the scores. Default: 1 / sqrt(D).
        kept: where our kernel keeps its results, if attention is computed twice.

    Returns:
        (Tq, H, D). Half precision on a GPU takes one kernel for all segments, all else a few products.

    Raises:
        ValueError: for shapes or lengths that do not fit together.
    """
    _check(q, k, v, lengths_q, lengths_k)
    if _kernel_is_best(q):
        from .packed_attention_triton import packed_attention_triton

        scale = q.shape[2] ** -0.5 if scale is None else scale
        return packed_attention_triton(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, kept)
    if flash_takes(q):
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, scale)[0]
    if _is_ragged(lengths_q, lengths_k):
        return packed_attention_batched(q, k, v, lengths_q, lengths_k, scale)[0]
    return packed_attention_reference(q, k, v, lengths_q, lengths_k, scale)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], scale: float | None = None
) -> Tensor:
    """Definition of `packed_attention`: one segment after the other."""
    outputs = [
        _segment(*segment, scale)
        for segment in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ]
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def packed_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `packed_attention` and the natural logarithm of each query's softmax denominator.

    Returns:
        out (Tq, H, D), and lse (Tq, H) float32, which has no gradient; -inf where a segment has no key.

    Raises:
        ValueError: for shapes or lengths that do not fit together.
    """
    _check(q, k, v, lengths_q, lengths_k)
    if flash_takes(q):
        out, lse = _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, scale)
        return out, lse.detach().t().masked_fill(lse.t() == torch.inf, -torch.inf)
    if _is_ragged(lengths_q, lengths_k):
        return packed_attention_batched(q, k, v, lengths_q, lengths_k, scale)
    return packed_attention_with_lse_reference(q, k, v, lengths_q, lengths_k, scale)


def packed_attention_with_lse_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Definition of `packed_attention_with_lse`."""
    segments = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    results = [_segment_with_lse(*segment, scale) for segment in segments]
    if not results:
        return torch.zeros_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    outputs, lses = zip(*results, strict=True)
    return torch.cat(outputs), torch.cat(lses)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.shape != k.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"expected q (Tq, H, D), k and v (Tk, Hk, D), Hk dividing H, got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if len(lengths_q) != len(lengths_k) or sum(lengths_q) != len(q) or sum(lengths_k) != len(k):
        raise ValueError(
            f"expected lengths of equally many segments with sums {len(q)} and {len(k)}, got {len(lengths_q)} and "
            f"{len(lengths_k)} segments with sums {sum(lengths_q)} and {sum(lengths_k)}"
        )


def _kernel_is_best(q: Tensor) -> bool:
    """Whether to take our kernel: for heads up to NARROW it is the fastest, for wider ones FlashAttention is."""
    if not is_half(q) or not on_triton(q) or torch.compiler.is_compiling():
        return False
    return q.shape[2] <= NARROW or (q.shape[2] <= WIDEST and not flash_takes(q))


def _is_ragged(lengths_q: list[int], lengths_k: list[int]) -> bool:
    """Whether the batched form is the faster one: there are several segments, and a query that has a key.

    The compiler takes the definition: the tiles depend on lengths, which would break its graph.
    """
    if torch.compiler.is_compiling():
        return False
    return len(lengths_q) > 1 and any(num_q and num_k for num_q, num_k in zip(lengths_q, lengths_k, strict=True))


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, scale) -> tuple[Tensor, Tensor]:
    """FlashAttention over all segments in one launch: out (Tq, H, D) and lse (H, Tq)."""
    max_q, max_k = max(lengths_q, default=0), max(lengths_k, default=0)
    if max_q == 0 or max_k == 0:
        return torch.zeros_like(q), q.new_full((q.shape[1], len(q)), -torch.inf, dtype=torch.float32)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, False, False, scale=scale
    )[:2]


def _segment(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention of one segment, (L, H, D)."""
    if len(q) == 0 or len(k) == 0:
        return torch.zeros_like(q)
    return _ungroup(F.scaled_dot_product_attention(*_group(q, k, v), scale=scale)[0], len(q))


def _segment_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of one segment, (L, H, D), and the logsumexp of its scores, (L, H) float32."""
    if len(q) == 0 or len(k) == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    grouped = _group(q, k, v)
    if q.is_cpu:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*grouped, scale=scale)
        return _ungroup(out[0], len(q)), _ungroup(lse[0].detach().float(), len(q))
    out = F.scaled_dot_product_attention(*grouped, scale=scale)
    return _ungroup(out[0], len(q)), _ungroup(_logsumexp(grouped[0][0], grouped[1][0], scale), len(q))


def _group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the G heads of a group into more queries, (1, Hk, L · G, D), so that no key is copied."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the CPU kernel needs stride 1
    q = q.unflatten(1, (k.shape[1], -1)).movedim(1, 0).flatten(1, 2)
    return q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _ungroup(x: Tensor, length: int) -> Tensor:
    """Undo `_group`: (Hk, L · G, ...) -> (L, H, ...)."""
    return x.unflatten(1, (length, -1)).movedim(0, 1).flatten(1, 2)


@torch.no_grad()
def _logsumexp(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """The logsumexp of the scores of q (Hk, L, D) against k (Hk, Lk, D): (Hk, L) float32."""
    keys = k.transpose(1, 2).float() * (k.shape[2] ** -0.5 if scale is None else scale)
    chunks = q.float().split(max(1, _LSE_ELEMENTS // (k.shape[0] * k.shape[1])), dim=1)
    return torch.cat([(chunk @ keys).logsumexp(-1) for chunk in chunks], dim=1)
