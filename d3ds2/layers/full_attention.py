"""Self attention of each sample over all of its tokens, with the projections of spatial sparse attention."""

from torch import Tensor, nn

from ..geometry.voxels import Voxels
from ..kernels.packed_attention import packed_attention


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
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_k = nn.Linear(hidden_size, kv_size, bias=False)
        self.to_v = nn.Linear(hidden_size, kv_size, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """x (N, C) -> (N, C)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.to_q, self.to_k, self.to_v))
        offsets, counts = voxels.cu_seqlens, voxels.counts
        return self.to_out(packed_attention(q, k, v, offsets, offsets, counts, counts).flatten(1))
