"""Self attention of each sample over all of its tokens, with the projections of spatial sparse attention."""

from torch import Tensor, nn

from ..geometry.voxels import Voxels
from ..kernels.kept import Kept
from ..kernels.packed_attention import packed_attention
from .linear import Linear, project


class FullAttention(nn.Module):
    """Attention of each token to all tokens of its sample, without biases.

    Args:
        hidden_size: C.
        num_heads, num_kv_heads: H and Hk; Hk divides H, which divides C.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        kv_size = num_kv_heads * self.head_dim
        self.to_q = Linear(hidden_size, hidden_size, bias=False)
        self.to_k = Linear(hidden_size, kv_size, bias=False)
        self.to_v = Linear(hidden_size, kv_size, bias=False)
        self.to_out = Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, voxels: Voxels, kept: Kept | None = None) -> Tensor:
        """x (N, C) -> (N, C); `kept` keeps the results of attention, if it is computed twice."""
        projected = project(x, [self.to_q, self.to_k, self.to_v])
        q, k, v = (rows.unflatten(-1, (-1, self.head_dim)) for rows in projected)
        offsets, counts = voxels.cu_seqlens, voxels.counts
        return self.to_out(packed_attention(q, k, v, offsets, offsets, counts, counts, kept=kept).flatten(1))
