"""Multi-head attention layers: within windows of voxels, to the context of a sample, and within a dense sample.

Sizes named in this file:
    N  tokens, all samples packed               H  heads                    C  channels of the tokens
    L  tokens of the context, or of a sample    D  channels per head        B  samples

A packed batch is cut into samples by `cu_seqlens` (B + 1,) int32 on the device, where each begins, and `lengths` on the
host, how long each is. A token whose sample has no context gets zeros from attention.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.voxels import Windows
from ..kernels.head_norm import head_rms_norm
from ..kernels.kept import Kept
from ..kernels.packed_attention import packed_attention
from .linear import Linear


class WindowAttention(nn.Module):
    """Multi-head self attention within the windows of `Voxels.windows`. All projections have biases."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_qkv = Linear(hidden_size, 3 * hidden_size)
        self.to_out = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x (N, C) -> (N, C)."""
        if windows.order is not None:
            x = x[windows.order]
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # (N, H, D) each
        cu_seqlens, lengths = windows.cu_seqlens, windows.lengths
        out = self.to_out(packed_attention(q, k, v, cu_seqlens, cu_seqlens, lengths, lengths).flatten(1))
        return out if windows.order is None else out[windows.inverse]


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the context of their sample. All projections have biases."""

    def __init__(self, hidden_size: int, context_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_q = Linear(hidden_size, hidden_size)
        self.to_kv = Linear(context_size, 2 * hidden_size)
        self.to_out = Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        cu_seqlens: Tensor,
        context_cu_seqlens: Tensor,
        lengths: list[int],
        context_lengths: list[int],
        kept: Kept | None = None,
    ) -> Tensor:
        """x (N, C), context (L, context_size) -> (N, C); L counts the context of all samples.

        `kept` keeps the results of attention, if it is computed twice.
        """
        q = self.to_q(x).unflatten(-1, (self.num_heads, self.head_dim))  # (N, H, D)
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(1)  # (L, H, D) each
        out = packed_attention(q, k, v, cu_seqlens, context_cu_seqlens, lengths, context_lengths, kept=kept)
        return self.to_out(out.flatten(1))


class HeadRMSNorm(nn.Module):
    """RMS norm of each head: x / ‖x‖ · √D · gamma in fp32, with gamma (H, D)."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H, D) -> the same shape and dtype."""
        return head_rms_norm(x, self.gamma)


class SelfAttention(nn.Module):
    """Multi-head self attention of dense samples. All projections have biases; queries and keys may be RMS-normed."""

    def __init__(self, hidden_size: int, num_heads: int, qk_rms_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = Linear(hidden_size, 3 * hidden_size)
        self.to_out = Linear(hidden_size, hidden_size)
        head_dim = hidden_size // num_heads
        self.q_norm = HeadRMSNorm(num_heads, head_dim) if qk_rms_norm else nn.Identity()
        self.k_norm = HeadRMSNorm(num_heads, head_dim) if qk_rms_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, L, H, D) each
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)  # (B, H, L, D)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return self.to_out(out.transpose(1, 2).flatten(2))
