"""Multi-head attention layers: over windows of voxels, to the context of a sample, over a whole sample.

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

from ..geometry.voxels import Windows
from ..kernels.packed_attention import packed_attention


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
