"""Layers that the transformers share: layer norm, feed-forward, time embedding and adaptive modulation.

Sizes named in this file:
    N  tokens, all samples packed      B  samples      C  hidden size
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.devices import autocast_dtype
from ..kernels.feed_forward import feed_forward
from ..kernels.kept import Kept
from ..kernels.linear import trains_by_hand
from ..kernels.modulation import affine_norm, sum_and_affine_norm, sum_and_norm
from ..kernels.ragged import Ragged
from .linear import Linear, are_plain

NUM_FREQUENCIES = 128  # of the time embedding
SLICE_ROWS = 8192  # tokens at a time in a feed-forward without gradients, whose hidden layer is the widest tensor


class LayerNorm32(nn.LayerNorm):
    """Layer norm of x (N, C), by default with eps 1e-6 and without affine; torch's kernels keep statistics in fp32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, affine: bool = False):
        super().__init__(hidden_size, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return affine_norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, h: Tensor, gate: Tensor | None, x: Tensor | None, samples: Ragged | None) -> tuple[Tensor, Tensor]:
        """h + gate x and its affine norm, (N, C) each; the arguments are those of `sum_and_norm`."""
        return sum_and_affine_norm(h, gate, x, self.weight, self.bias, samples, self.eps)


class ModulatedNorm(nn.LayerNorm):
    """A sum, and its layer norm with eps 1e-6 and without affine, times 1 + scale, plus shift."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, eps=1e-6, elementwise_affine=False)

    def forward(
        self, h: Tensor, gate: Tensor | None, x: Tensor | None, shift: Tensor, scale: Tensor, samples: Ragged | None
    ) -> tuple[Tensor, Tensor]:
        """h + gate x and its modulated norm, (N, C) each; the arguments are those of `sum_and_norm`."""
        return sum_and_norm(h, gate, x, shift, scale, samples, self.eps)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear: (N, C) -> (N, C)."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.up = Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.down = Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """(..., C) -> (..., C); `kept` keeps the result, if it is computed twice."""
        if not torch.is_grad_enabled() and x.ndim == 2 and len(x) > SLICE_ROWS:
            return self._in_slices(x)
        if trains_by_hand(x) and are_plain([self.up, self.down]):
            return feed_forward(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, kept)
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def _in_slices(self, x: Tensor) -> Tensor:
        """Compute the same without gradients, `SLICE_ROWS` tokens at a time, straight into the result."""
        dtype = autocast_dtype(x.device) or x.dtype
        weight, bias = self.down.weight.to(dtype), self.down.bias.to(dtype)
        out = x.new_empty(len(x), len(weight), dtype=dtype)
        for rows, result in zip(x.split(SLICE_ROWS), out.split(SLICE_ROWS), strict=True):
            hidden = torch.ops.aten.gelu_(self.up(rows), approximate="tanh")
            torch.addmm(bias, hidden, weight.t(), out=result)
        return out


def time_frequencies(t: Tensor) -> Tensor:
    """[cos(1000 t f_i) | sin(1000 t f_i)], f_i = 10000^(-i/128): t (B,) in [0, 1] -> (B, 256) float32."""
    exponent = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=t.device) / NUM_FREQUENCIES
    angles = (1000.0 * t).float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1], 1 = noise -> (B, C)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_frequencies(t).to(self.mlp[0].weight.dtype))


class Modulation(nn.Module):
    """The six adaptive parameters of a block: shift, scale and gate of its attention, then of its feed-forward.

    With `shared`, the model owns one projection for all blocks (`modulation_projection`), and each block learns an
    offset to it. Otherwise every block projects the time embedding itself.
    """

    def __init__(self, hidden_size: int, shared: bool):
        super().__init__()
        if shared:
            self.offset = nn.Parameter(torch.zeros(6 * hidden_size))
        else:
            self.projection = modulation_projection(hidden_size)
        self.shared = shared

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """The time embedding (B, C) or, when shared, its projection (B, 6 C) -> six tensors (B, C)."""
        parameters = embedding + self.offset if self.shared else self.projection(embedding)
        return parameters.chunk(6, dim=-1)


def modulation_projection(hidden_size: int) -> nn.Sequential:
    """Return SiLU and a zero-initialised Linear C -> 6 C: training starts with every block as the identity."""
    projection = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
    nn.init.zeros_(projection[1].weight)
    nn.init.zeros_(projection[1].bias)
    return projection


def initialize_linear(module: nn.Module) -> None:
    """Give a Linear Xavier-uniform weights and zero biases; for `Module.apply` on networks trained from scratch."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def zero_linear(linear: nn.Linear) -> None:
    """Zero the weights and the bias, so that the layer adds nothing at first."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
