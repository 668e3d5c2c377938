"""Softmax attention over packed samples of different lengths, and the multi-head layers made of it.

Sizes named in this file:
    Tq, Tk  queries and keys, all segments packed      H  query heads        G  query heads per key head, H / Hk
    C       channels of the tokens                     Hk key/value heads    D  channels per head

A packed batch is cut into segments (samples, or attention windows) by `cu_seqlens` (segments + 1,) int32 on the device
and `lengths`, the same on the host. Queries attend to all keys of the segment with their number; a query whose segment
has no key gets zeros. Query head h reads key head h // G.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.runs import HAS_TRITON
from .voxels import Windows

_LSE_ELEMENTS = 1 << 24  # logits held at once where no kernel returns the logsumexp


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v within each segment (eq. 4-5).

    Args:
        q: queries (Tq, H, D).
        k, v: keys and values (Tk, Hk, D) of the dtype of q; Hk divides H.
        cu_seqlens_q, cu_seqlens_k: first row of each segment and, last, Tq or Tk, (segments + 1,) int32.
        lengths_q, lengths_k: tokens of each segment, on the host; zero is allowed.
        scale: factor on the scores. Default: 1 / sqrt(D).

    Returns:
        (Tq, H, D). One kernel for all segments on CUDA in half precision, one per segment otherwise.

    Raises:
        ValueError: for shapes or lengths that do not fit together.
    """
    _check(q, k, v, lengths_q, lengths_k)
    if _has_varlen_kernel(q):
        if HAS_TRITON and q.shape[2] <= 32 and not torch.compiler.is_compiling():
            from .kernels.packed_attention_triton import packed_attention_triton

            scale = q.shape[2] ** -0.5 if scale is None else scale
            return packed_attention_triton(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, scale)[0]
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
    """`packed_attention`, and the natural logarithm of each query's softmax denominator.

    Returns:
        out (Tq, H, D), and lse (Tq, H) float32, which carries no gradient; -inf where a segment has no key.
    """
    _check(q, k, v, lengths_q, lengths_k)
    if _has_varlen_kernel(q):
        out, lse = _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, scale)
        return out, lse.detach().t().masked_fill(lse.t() == torch.inf, -torch.inf)
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
            f"{len(lengths_k)} with sums {sum(lengths_q)} and {sum(lengths_k)}"
        )


def _has_varlen_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, scale) -> tuple[Tensor, Tensor]:
    """FlashAttention over all segments at once: out (Tq, H, D) and lse (H, Tq)."""
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
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*grouped, scale=scale)
        return _ungroup(out[0], len(q)), _ungroup(lse[0].detach().float(), len(q))
    out = F.scaled_dot_product_attention(*grouped, scale=scale)
    return _ungroup(out[0], len(q)), _ungroup(_logsumexp(grouped[0][0], grouped[1][0], scale), len(q))


def _group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The G heads of a group become more queries, (1, Hk, L · G, D), so that no key is copied."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the CPU kernel relies on it
    q = q.unflatten(1, (k.shape[1], -1)).movedim(1, 0).flatten(1, 2)
    return q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _ungroup(x: Tensor, length: int) -> Tensor:
    """The inverse: (Hk, L · G, ...) -> (L, H, ...)."""
    return x.unflatten(1, (length, -1)).movedim(0, 1).flatten(1, 2)


@torch.no_grad()
def _logsumexp(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Of the scores of q (Hk, L, D) against k (Hk, Lk, D): (Hk, L) float32."""
    keys = k.transpose(1, 2).float() * (k.shape[2] ** -0.5 if scale is None else scale)
    chunks = q.float().split(max(1, _LSE_ELEMENTS // (k.shape[0] * k.shape[1])), dim=1)
    return torch.cat([(chunk @ keys).logsumexp(-1) for chunk in chunks], dim=1)


class WindowAttention(nn.Module):
    """Multi-head self attention within the windows of `Voxels.windows`, with biases."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x (N, C) -> (N, C)."""
        if windows.order is not None:
            x = x[windows.order]
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # (N, H, D) each
        cu_seqlens, lengths = windows.cu_seqlens, windows.lengths
        out = self.to_out(packed_attention(q, k, v, cu_seqlens, cu_seqlens, lengths, lengths).flatten(1))
        return out if windows.order is None else out[windows.inverse]


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the context of their sample, with biases."""

    def __init__(self, hidden_size: int, context_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_kv = nn.Linear(context_size, 2 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        cu_seqlens: Tensor,
        context_cu_seqlens: Tensor,
        lengths: list[int],
        context_lengths: list[int],
    ) -> Tensor:
        """x (N, C), context (L, context_size) -> (N, C)."""
        q = self.to_q(x).unflatten(-1, (self.num_heads, self.head_dim))  # (N, H, D)
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(1)  # (L, H, D) each
        out = packed_attention(q, k, v, cu_seqlens, context_cu_seqlens, lengths, context_lengths)
        return self.to_out(out.flatten(1))


class HeadRMSNorm(nn.Module):
    """x / ‖x‖ · √D · gamma per head, statistics in fp32; gamma is (H, D)."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H, D) -> the same shape and dtype."""
        return (F.normalize(x.float(), dim=-1) * self.gamma.float() * x.shape[-1] ** 0.5).to(x.dtype)


class SelfAttention(nn.Module):
    """Full multi-head self attention of dense samples, with biases and optionally RMS-normed queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_rms_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        head_dim = hidden_size // num_heads
        self.q_norm = HeadRMSNorm(num_heads, head_dim) if qk_rms_norm else nn.Identity()
        self.k_norm = HeadRMSNorm(num_heads, head_dim) if qk_rms_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, L, H, D) each
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)  # (B, H, L, D)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return self.to_out(out.transpose(1, 2).flatten(2))
