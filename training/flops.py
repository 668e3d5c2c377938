"""Floating-point operations of the networks: what one step of training computes.

A multiplication and an addition are two operations. Only matrix products count, as in torch's flop counter:

    dense       linear layers and convolutions. A convolution has 27 taps for each voxel, with zeros where there is no
                neighbour; one that doubles the resolution has 8 for each child.
    attention   products with keys and with values. Spatial sparse attention (eq. 6-8) attends to the compressed tokens,
                to the K selected blocks and to the window, and not to the N tokens of the shape.
    scores      the second product with the compressed keys, for the choice of blocks (eq. 8). It has no gradient.

The backward pass takes twice the dense products, and 2.5 times those of attention, whose kernels compute the scores
once more. Where blocks are recomputed, the forward pass counts twice; where they keep what attention has made, only its
dense products do.

Sizes: N tokens of a shape, n those of all shapes together, C hidden size, L image tokens of a picture.
"""

from typing import NamedTuple

from d3ds2.networks.image_encoder import ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAEConfig

TIME_FREQUENCIES = 256  # values of the time embedding
TAPS, CHILD_TAPS = 27, 64  # of a convolution for each voxel; of one to the eight children of each voxel


class ShapeSize(NamedTuple):
    """The size of a shape, on which its cost depends. All but the first are ratios to the number of its tokens."""

    tokens: float  # N, occupied latent voxels at R/8
    voxels: tuple[float, float, float]  # active SDF voxels at R, and those at R/2 and R/4 that hold one
    cells: dict[int, float]  # occupied cells of 4³ and of 8³ latent voxels
    neighbours: float  # tokens in the 8³ window of a token, itself included

    def cells_of(self, edge: int) -> float:
        """Occupied cells of edge³ latent voxels; where none were counted, as many as a surface has."""
        return self.cells.get(edge) or min(1.0, self.cells[4] * (4 / edge) ** 2)


class Flops(NamedTuple):
    """Operations of a forward pass."""

    dense: float = 0.0
    attention: float = 0.0
    scores: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Flops":
        """The operations of `factor` such passes."""
        return Flops(*(factor * value for value in self))

    @property
    def forward(self) -> float:
        """All of them."""
        return sum(self)

    def step(self, recompute: bool, keep_attention: bool = False) -> float:
        """Forward and backward pass; `recompute`: the forward pass once more, without attention if that is kept."""
        again, attention_again = int(recompute), int(recompute and not keep_attention)
        return (3 + again) * self.dense + (3.5 + attention_again) * self.attention + (1 + attention_again) * self.scores


def latent_dit(config: LatentDiTConfig, size: ShapeSize, image_tokens: float) -> Flops:
    """Count one shape; L image tokens are those that the network sees.

    Raises:
        ValueError: the form of attention is not counted here.
    """
    if config.attention == "sequence" or config.packing_channels:
        raise ValueError("expected a latent DiT with spatial or full attention and without packing")
    N, C, L = size.tokens, config.hidden_size, image_tokens
    kv = C // config.num_heads * config.num_kv_heads  # channels of keys, and of values
    cells, blocks = N * size.cells_of(config.compression_block), N * size.cells_of(8)
    every, branches = config.top_k >= blocks, config.branches if config.attention == "spatial" else ()
    compression = 2 * 2 * kv**2 * (cells * 2 * TAPS if config.pooled_conv else N)  # of keys and of values
    selected = N if every else min(N, config.top_k * size.neighbours)
    context = C if config.sparse_context else config.context_size
    dense = 2 * N * (2 * C * C + 2 * C * kv + len(branches) * C) + _cross(N, C, L, context) + _feed_forward(N, config)
    dense += compression if "compression" in branches else 0
    modulation = 0 if config.share_modulation else 2 * C * 6 * C
    keys = {"compression": cells, "selection": selected, "window": size.neighbours}
    attended = L + (sum(keys[branch] for branch in branches) if branches else N)
    scores = 0 if every or "selection" not in branches else 2 * N * C * cells
    block = Flops(dense + modulation, 4 * N * C * attended, scores)
    outer = 2 * N * 2 * config.latent_channels * C + _time(C, config.share_modulation)
    outer += 2 * L * config.context_size * C if config.sparse_context else 0
    return block.times(config.depth) + Flops(outer)


def structure_dit(config: StructureDiTConfig, image_tokens: float) -> Flops:
    """Count one sample, which sees all image tokens."""
    N, C = config.resolution**3, config.hidden_size
    dense = 2 * N * 4 * C * C + _cross(N, C, image_tokens, config.context_size) + _feed_forward(N, config)
    modulation = 0 if config.share_modulation else 2 * C * 6 * C
    block = Flops(dense + modulation, 4 * N * C * (N + image_tokens))
    outer = 2 * N * 2 * config.latent_channels * C + _time(C, config.share_modulation)
    return block.times(config.depth) + Flops(outer)


def image_encoder(config: ImageEncoderConfig) -> Flops:
    """Count one picture; a convolutional backbone in front is not counted."""
    patches, C = (config.image_size // config.patch_size) ** 2, config.hidden_size
    N = patches + 1 + config.num_registers
    block = Flops(2 * N * 4 * C * C + _feed_forward(N, config), 4 * N * C * N)
    return block.times(config.depth) + Flops(2 * patches * 3 * config.patch_size**2 * C)


def sdf_encoder(config: SDFVAEConfig, size: ShapeSize) -> Flops:
    """Count one shape: all active voxels to the posterior of its latents."""
    N, C, widths = size.tokens, config.hidden_size, config.widths
    counts = [N * ratio for ratio in (*size.voxels, 1.0)]  # at R, R/2, R/4 and R/8
    dense = 2 * counts[0] * widths[0] + 2 * N * C * (C + 2 * config.latent_channels)
    for i in range(3):
        taps = TAPS * (widths[i] + widths[i + 1]) + widths[i] + (8 * widths[i] if config.voxel_place else 0)
        dense += 2 * counts[i + 1] * taps * widths[i + 1]
    return Flops(dense) + _window_blocks(config, size, config.encoder_depth)


def sdf_decoder(config: SDFVAEConfig, size: ShapeSize, share: float = 1.0) -> Flops:
    """Count one shape; a share of its latents is upsampled."""
    N, C, widths = size.tokens, config.hidden_size, config.widths
    dense = 2 * N * config.latent_channels * C
    for level, i in enumerate(reversed(range(3))):
        cells = share * N * 8**level
        dense += 2 * cells * widths[i] * (TAPS * widths[i + 1] + CHILD_TAPS * widths[i])
    return Flops(dense + 2 * share * N * 8**3 * widths[0]) + _window_blocks(config, size, config.decoder_depth)


def structure_vae(config: StructureVAEConfig, edge: int) -> Flops:
    """Count one grid of edge³ voxels, encoded and decoded."""
    dense = 2.0 * TAPS * edge**3 * (config.encoder_widths[0] + config.decoder_widths[-1])
    inner, latents = (edge // config.factor) ** 3, config.latent_channels
    dense += 2 * TAPS * inner * latents * (2 * config.encoder_widths[-1] + config.decoder_widths[0])
    for widths, blocks, middle in (
        (config.encoder_widths, config.encoder_res_blocks, config.encoder_middle_blocks),
        (config.decoder_widths[::-1], config.decoder_res_blocks, config.decoder_middle_blocks),
    ):
        for level, width in enumerate(widths):
            number = blocks + (middle if level == len(widths) - 1 else 0)
            dense += number * 2 * 2 * TAPS * (edge // 2**level) ** 3 * width**2
    for level in range(len(config.encoder_widths) - 1):
        coarse = (edge // 2 ** (level + 1)) ** 3
        dense += 2 * coarse * 8 * config.encoder_widths[level] * config.encoder_widths[level + 1]
        narrow, wide = config.decoder_widths[::-1][level : level + 2]
        dense += 2 * coarse * TAPS * wide * 8 * narrow
    return Flops(dense)


def _window_blocks(config: SDFVAEConfig, size: ShapeSize, depth: int) -> Flops:
    N, C = size.tokens, config.hidden_size
    return Flops(2 * N * (4 * C * C + 8 * C * C), 4 * N * C * size.neighbours).times(depth)


def _cross(tokens: float, channels: int, image_tokens: float, context_size: int) -> float:
    """The dense products of attention to the image."""
    return 2 * tokens * 2 * channels**2 + 2 * image_tokens * context_size * 2 * channels


def _feed_forward(tokens: float, config) -> float:
    return 2 * tokens * 2 * config.hidden_size * int(config.hidden_size * config.mlp_ratio)


def _time(channels: int, share_modulation: bool) -> float:
    """The embedding of a sample's time."""
    return 2 * channels * (TIME_FREQUENCIES + channels + (6 * channels if share_modulation else 0))
