"""The structure diffusion transformer: a dense grid of latents, time and image tokens -> velocity.

Sizes named in this file:
    B  samples      R  resolution of the grid      L  image tokens, all samples packed      C  hidden size
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..geometry.position_embedding import absolute_position_embedding
from ..kernels.modulation import gated_sum
from ..layers.attention import CrossAttention, SelfAttention
from ..layers.transformer import (
    FeedForward,
    LayerNorm32,
    ModulatedNorm,
    Modulation,
    TimestepEmbedder,
    initialize_linear,
    modulation_projection,
    zero_linear,
)
from .image_encoder import ImageTokens
from .sizes import check_sizes


@dataclass(frozen=True)
class StructureDiTConfig:
    """Sizes of the structure DiT; the defaults are those of the released models.

    Raises ValueError for sizes that do not fit together.
    """

    resolution: int = 16
    latent_channels: int = 8
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    context_size: int = 1024
    qk_rms_norm: bool = True
    share_modulation: bool = False

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"expected num_heads dividing hidden_size {self.hidden_size}, got {self.num_heads}")


class StructureBlock(nn.Module):
    """Full self-attention, cross-attention to the image, feed-forward."""

    def __init__(self, config: StructureDiTConfig):
        super().__init__()
        C = config.hidden_size
        self.modulation = Modulation(C, config.share_modulation)
        self.norm1 = ModulatedNorm(C)
        self.self_attention = SelfAttention(C, config.num_heads, config.qk_rms_norm)
        self.norm2 = LayerNorm32(C, affine=True)
        self.cross_attention = CrossAttention(C, config.context_size, config.num_heads)
        self.norm3 = ModulatedNorm(C)
        self.feed_forward = FeedForward(C, config.mlp_ratio)

    def forward(
        self, h: Tensor, embedding: Tensor, cu_seqlens: Tensor, context: Tensor, context_cu: Tensor, context_lengths
    ) -> Tensor:
        """h (B, R³, C), embedding (B, C) (or (B, 6 C), with a shared modulation), context (L, ·) -> (B, R³, C)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)  # (B, C) each
        B, lengths = len(h), [h.shape[1]] * len(h)
        h, normed = self.norm1(h, None, None, shift_1, scale_1, None)
        h, normed = self.norm2.of_sum(h, gate_1, self.self_attention(normed), None)
        normed = normed.flatten(0, 1)  # (B R³, C)
        out = self.cross_attention(normed, context, cu_seqlens, context_cu, lengths, context_lengths)
        h, normed = self.norm3(h, None, out.unflatten(0, (B, -1)), shift_2, scale_2, None)
        return gated_sum(h, gate_2, self.feed_forward(normed), None)


def grid_embedding(resolution: int, channels: int, device: torch.device | str | None = None) -> Tensor:
    """Return the position embeddings (R³, C) float32 of all voxels of a grid; default: on torch's default device."""
    steps = torch.arange(resolution, device=device)
    grid = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1).flatten(0, 2)  # (R³, 3)
    return absolute_position_embedding(grid, channels)


def _make_position(module: "StructureDiT", _keys: object) -> None:
    """Compute the position of a network that was built on "meta", once weights of its shapes are there."""
    if module.position.is_meta:
        module.position = grid_embedding(module.config.resolution, module.config.hidden_size, "cpu")


class StructureDiT(nn.Module):
    """Velocity of the rectified flow on dense structure latents.

    `gradient_checkpointing = True` recomputes every block in the backward pass.
    """

    def __init__(self, config: StructureDiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        C = config.hidden_size
        self.time_embedder = TimestepEmbedder(C)
        self.shared_modulation = modulation_projection(C) if config.share_modulation else nn.Identity()
        self.input_layer = nn.Linear(config.latent_channels, C)
        self.register_buffer("position", grid_embedding(config.resolution, C), persistent=False)
        self.register_load_state_dict_post_hook(_make_position)
        self.blocks = nn.ModuleList(StructureBlock(config) for _ in range(config.depth))
        self.norm_out = LayerNorm32(C, eps=1e-5)
        self.output_layer = nn.Linear(C, config.latent_channels)
        self.initialize()

    def initialize(self) -> None:
        """Start training from scratch, with every block the identity and the velocity zero."""
        self.apply(initialize_linear)
        for block in self.blocks:
            zero_linear(block.cross_attention.to_out)
            if not self.config.share_modulation:
                zero_linear(block.modulation.projection[1])
        if self.config.share_modulation:
            zero_linear(self.shared_modulation[1])
        zero_linear(self.output_layer)

    def forward(self, x_t: Tensor, t: Tensor, image_tokens: ImageTokens) -> Tensor:
        """Return the velocity at x_t.

        Args:
            x_t: noisy latents (B, latent_channels, R, R, R), indexed [x, y, z].
            t: time of each sample, (B,) in [0, 1]; 1 is noise.
            image_tokens: conditioning of the B samples.

        Returns:
            The velocity, shaped as x_t, in the dtype of the parameters (or of autocast).

        Raises:
            ValueError: for inputs that do not fit together.
        """
        B, R = len(x_t), self.config.resolution
        if x_t.shape[1:] != (self.config.latent_channels, R, R, R):
            raise ValueError(f"expected x_t (B, {self.config.latent_channels}, {R}, {R}, {R}), got {tuple(x_t.shape)}")
        if t.shape != (B,) or image_tokens.batch_size != B:
            raise ValueError(
                f"expected t and image tokens of {B} samples, got t {tuple(t.shape)} and {image_tokens.batch_size}"
            )
        dtype = self.input_layer.weight.dtype
        h = self.input_layer(x_t.to(dtype).flatten(2).transpose(1, 2)) + self.position.to(dtype)  # (B, R³, C)
        embedding = self.shared_modulation(self.time_embedder(t))
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=x_t.device) * R**3
        context = image_tokens.features.to(dtype)
        arguments = embedding, cu_seqlens, context, image_tokens.cu_seqlens, image_tokens.counts
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, *arguments, use_reentrant=False)
            else:
                h = block(h, *arguments)
        return self.output_layer(self.norm_out(h)).transpose(1, 2).unflatten(2, (R, R, R))
