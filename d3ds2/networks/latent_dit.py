"""The latent diffusion transformer: noisy latents on a sparse grid, time and image tokens -> velocity.

Sizes named in this file:
    N  latent voxels (tokens), all samples packed      C  hidden size      B  samples
    L  image tokens, all samples packed
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..geometry.position_embedding import absolute_position_embedding
from ..geometry.segments import samples_of
from ..geometry.voxels import BLOCK, Voxels
from ..kernels.kept import Kept
from ..kernels.modulation import gated_sum
from ..layers.attention import CrossAttention
from ..layers.full_attention import FullAttention
from ..layers.spatial_sparse_attention import BRANCHES, Branch, SpatialSparseAttention, check_branches
from ..layers.token_packing import EDGE, TokenPacking
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
class LatentDiTConfig:
    """Sizes of the latent DiT; the defaults are the paper's.

    Those are the sizes of the released models, m_cmp 4, convolutional compression and top-k 8. Raises ValueError for
    sizes that do not fit together.

    Three keys are for ablations. `branches` are those of spatial sparse attention in use. `attention` takes blocks of
    8³ voxels ("spatial"), blocks of 64 consecutive tokens and a sliding window ("sequence", as NSA), or all tokens of a
    sample ("full"). With `packing_channels` above 0, residual blocks of so many channels pack 2³ voxels into a token
    before the transformer and unpack them after it, as TRELLIS does with 128.

    With `surplus_value` above 0, the network was trained on structures with surplus blocks. Their latents, in the form
    in which the network samples them, have this value in every channel, and are left out before decoding. With 0, all
    blocks are decoded: the structures have no surplus blocks, or their latents decode to an SDF without a surface.
    """

    latent_channels: int = 16
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 32
    num_kv_heads: int = 2
    mlp_ratio: float = 4.0
    context_size: int = 1024
    compression_block: int = 4
    pooled_conv: bool = True
    selection_block: int = BLOCK
    top_k: int = 8
    window: int = 8
    sparse_context: bool = True
    position_factor: float = 1.0
    share_modulation: bool = False
    branches: tuple[Branch, ...] = BRANCHES
    attention: Literal["spatial", "sequence", "full"] = "spatial"
    packing_channels: int = 0
    surplus_value: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_kv_heads dividing num_heads dividing hidden_size, got {self.num_kv_heads}, "
                f"{self.num_heads}, {self.hidden_size}"
            )
        if self.selection_block != BLOCK:
            raise ValueError(f"expected a selection_block of {BLOCK}, got {self.selection_block}")
        if self.compression_block < 1 or BLOCK % self.compression_block:
            raise ValueError(f"expected a compression_block that divides {BLOCK}, got {self.compression_block}")
        check_branches(self.branches, self.attention == "sequence", self.compression_block, self.pooled_conv)


def has_surface(latents: Tensor, surplus_value: float) -> Tensor:
    """Tell which normalised latents (N, C) say that there is a surface in their block, (N,) bool.

    Args:
        surplus_value: of the network that sampled them, above 0, see `LatentDiTConfig`.
    """
    return latents.mean(1) < surplus_value / 2


def self_attention(config: LatentDiTConfig, shift: int) -> nn.Module:
    """Make the attention that the config asks for; `shift` displaces its windows, in voxels."""
    sizes = config.hidden_size, config.num_heads, config.num_kv_heads
    if config.attention == "full":
        return FullAttention(*sizes)
    return SpatialSparseAttention(
        *sizes,
        config.compression_block,
        config.pooled_conv,
        config.top_k,
        config.window,
        shift,
        branches=config.branches,
        in_sequence=config.attention == "sequence",
    )


class LatentBlock(nn.Module):
    """Self attention (by default spatial sparse attention), cross-attention to the image, feed-forward."""

    def __init__(self, config: LatentDiTConfig, shift: int):
        super().__init__()
        C = config.hidden_size
        self.modulation = Modulation(C, config.share_modulation)
        self.norm1 = ModulatedNorm(C)
        self.self_attention = self_attention(config, shift)
        self.norm2 = LayerNorm32(C, affine=True)
        self.cross_attention = CrossAttention(C, C if config.sparse_context else config.context_size, config.num_heads)
        self.norm3 = ModulatedNorm(C)
        self.feed_forward = FeedForward(C, config.mlp_ratio)

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        voxels: Voxels,
        context: Tensor,
        context_cu: Tensor,
        context_lengths: list,
        kept: Kept | None = None,
    ) -> Tensor:
        """h (N, C), embedding (B, C) (or (B, 6 C), with a shared modulation), context (L, ·) -> (N, C).

        `kept` keeps the results of attention and feed-forward, if the block is computed twice.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)
        samples = samples_of(voxels)
        h, normed = self.norm1(h, None, None, shift_1, scale_1, samples)
        attended = self.self_attention(normed, voxels, kept)
        h, normed = self.norm2.of_sum(h, gate_1, attended, samples)
        lengths = voxels.counts, context_lengths
        attended = self.cross_attention(normed, context, voxels.cu_seqlens, context_cu, *lengths, kept)
        h, normed = self.norm3(h, None, attended, shift_2, scale_2, samples)
        return gated_sum(h, gate_2, self.feed_forward(normed, kept), samples)


class LatentDiT(nn.Module):
    """Velocity of the rectified flow on the latents of a sparse structure.

    `gradient_checkpointing = True` recomputes every block in the backward pass, but for the results of attention and
    feed-forward, which Triton's kernels keep: 13 kB a token and block at the paper's sizes. `recompute_all = True`
    recomputes those too.
    """

    def __init__(self, config: LatentDiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.recompute_all = False
        C = config.hidden_size
        self.time_embedder = TimestepEmbedder(C)
        self.shared_modulation = modulation_projection(C) if config.share_modulation else nn.Identity()
        width = config.packing_channels or C
        self.input_layer = nn.Linear(config.latent_channels, width)
        self.packing = TokenPacking(width, C) if config.packing_channels else None
        self.context_layer = nn.Linear(config.context_size, C) if config.sparse_context else nn.Identity()
        shifts = [0 if i % 2 == 0 else config.window // 2 for i in range(config.depth)]
        self.blocks = nn.ModuleList(LatentBlock(config, shift) for shift in shifts)
        self.norm_out = LayerNorm32(width, eps=1e-5)
        self.output_layer = nn.Linear(width, config.latent_channels)
        self.initialize()

    def initialize(self) -> None:
        """Start training from scratch, with every block the identity and the velocity zero."""
        self.apply(initialize_linear)
        for block in self.blocks:
            if self.config.attention != "full":
                zero_linear(block.self_attention.gate)  # the gates of all branches are one half
            zero_linear(block.cross_attention.to_out)
            if not self.config.share_modulation:
                zero_linear(block.modulation.projection[1])
        if self.config.share_modulation:
            zero_linear(self.shared_modulation[1])
        if self.packing is not None:
            self.packing.initialize()
        zero_linear(self.output_layer)

    def forward(self, x_t: Tensor, t: Tensor, voxels: Voxels, image_tokens: ImageTokens) -> Tensor:
        """Return the velocity at x_t.

        Args:
            x_t: noisy latents (N, latent_channels), rows of `voxels`.
            t: time of each sample, (B,) in [0, 1]; 1 is noise.
            voxels: the structure, B samples.
            image_tokens: conditioning of the B samples; with `sparse_context` the foreground tokens alone.

        Returns:
            The velocity (N, latent_channels), in the dtype of the parameters (or of autocast).

        Raises:
            ValueError: for inputs that do not fit together.
        """
        if x_t.shape != (len(voxels), self.config.latent_channels):
            raise ValueError(
                f"expected x_t ({len(voxels)}, {self.config.latent_channels}), the voxels' latents, "
                f"got {tuple(x_t.shape)}"
            )
        if t.shape != (voxels.batch_size,) or image_tokens.batch_size != voxels.batch_size:
            raise ValueError(
                f"expected t and image tokens of {voxels.batch_size} samples, got t {tuple(t.shape)} and "
                f"{image_tokens.batch_size}"
            )
        C, dtype = self.config.hidden_size, self.input_layer.weight.dtype
        h, time, made = self.input_layer(x_t.to(dtype)), self.time_embedder(t), None
        tokens = voxels
        if self.packing is not None:
            h, made = self.packing.pack(h, voxels, time)
            tokens = voxels.coarsen(EDGE)[0]
        h = h + tokens.position_embedding(C, self.config.position_factor, dtype)  # (N, C), fewer rows if packed
        context = self.context_layer(image_tokens.features.to(dtype))  # (L, C or context_size)
        if self.config.sparse_context:
            context = context + absolute_position_embedding(image_tokens.coords[:, 1:], C).to(dtype)  # eq. 9
        embedding = self.shared_modulation(time)
        arguments = embedding, tokens, context, image_tokens.cu_seqlens, image_tokens.counts
        for block in self.blocks:
            h = self._run(block, h, arguments)
        if self.packing is not None and made is not None:
            h = self.packing.unpack(h, made, voxels, time)
        return self.output_layer(self.norm_out(h))

    def _run(self, block: LatentBlock, h: Tensor, arguments: tuple) -> Tensor:
        if not self.gradient_checkpointing or not torch.is_grad_enabled():
            return block(h, *arguments)
        if self.recompute_all:
            return checkpoint(block, h, *arguments, use_reentrant=False)
        kept = Kept()
        return checkpoint(block, h, *arguments, kept, use_reentrant=False, context_fn=kept.contexts)
