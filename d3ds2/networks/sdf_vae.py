"""SS-VAE: the sparse SDF autoencoder (Direct3D-S2, section 3).

The encoder turns the SDF in a narrow band around the surface, at resolution R, into 16 numbers for each latent voxel,
at R / 8. The decoder returns all 8³ SDF voxels of every latent. The architecture is that of the released weights.

Sizes named in this file:
    N  active SDF voxels      L  latents, of all samples packed
    C  hidden size            E  latent channels
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..geometry.voxels import BLOCK, Voxels
from ..kernels.gather_conv import permute_rows
from ..layers.attention import WindowAttention
from ..layers.sparse_conv import (
    PackedGroupNorm,
    SubdivideConv3d,
    SubmanifoldConv3d,
    mean_pool,
    side_by_side,
)
from ..layers.transformer import FeedForward, LayerNorm32, initialize_linear
from .sizes import check_sizes

FACTOR = BLOCK  # SDF voxels per edge of a latent voxel, which decodes to a block by doubling three times


@dataclass(frozen=True)
class SDFVAEConfig:
    """Sizes of the SS-VAE; the defaults are the released ones.

    The position embedding takes latent coordinates times position_resolution / R. `latents_scale` and `latents_shift`
    normalise latents for the diffusion model. Raises ValueError for sizes that do not fit together.

    With `voxel_place`, each of the eight children of a voxel has its own weight in the encoder's pooling and in the
    decoder's subdivision. The released networks lack these weights. Mean pooling and submanifold convolutions ignore
    where in its cell a voxel lies. So without these weights, a surface whose band fits into half a block has the same
    latents in either half.
    """

    latent_channels: int = 16
    hidden_size: int = 512
    num_heads: int = 8
    encoder_depth: int = 4
    decoder_depth: int = 4
    window: int = 8
    group_norm_groups: int = 32
    position_resolution: int = 512
    voxel_place: bool = False
    latents_scale: float = 1.0
    latents_shift: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.hidden_size % 16 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"expected hidden_size divisible by 16 and by num_heads {self.num_heads}, got {self.hidden_size}"
            )
        if (self.hidden_size // 16) % self.group_norm_groups:
            raise ValueError(
                f"expected group_norm_groups that divides hidden_size / 16 = {self.hidden_size // 16}, "
                f"got {self.group_norm_groups}"
            )
        if self.latents_scale == 0:
            raise ValueError("expected latents_scale other than 0")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels at R, R / 2, R / 4 and R / 8 in the encoder; the decoder takes them backwards."""
        return self.hidden_size // 16, self.hidden_size // 8, self.hidden_size // 4, self.hidden_size


class WindowBlock(nn.Module):
    """A transformer block with attention in windows of `window`³ latents, shifted by half a window in odd blocks."""

    def __init__(self, config: SDFVAEConfig, index: int):
        super().__init__()
        self.window, self.shift = config.window, index % 2 * (config.window // 2)
        self.norm1 = LayerNorm32(config.hidden_size)
        self.attention = WindowAttention(config.hidden_size, config.num_heads)
        self.norm2 = LayerNorm32(config.hidden_size)
        self.feed_forward = FeedForward(config.hidden_size)

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(L, C) -> (L, C)."""
        x = x + self.attention(self.norm1(x), voxels.windows(self.shift, self.window))
        return x + self.feed_forward(self.norm2(x))


class DownBlock(nn.Module):
    """A residual block from resolution R to R / 2; `voxel_place` adds a weight for each of the 2³ children."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, voxel_place: bool):
        super().__init__()
        self.norm1 = PackedGroupNorm(num_groups, in_channels)
        self.conv1 = SubmanifoldConv3d(in_channels, out_channels)
        self.norm2 = PackedGroupNorm(num_groups, out_channels)
        self.conv2 = SubmanifoldConv3d(out_channels, out_channels)
        self.skip = nn.Linear(in_channels, out_channels)
        self.place = nn.Linear(8 * in_channels, out_channels, bias=False) if voxel_place else None

    def forward(self, x: Tensor, voxels: Voxels) -> tuple[Tensor, Voxels]:
        """(N, in_channels) -> (coarse N, out_channels), and the coarse voxels."""
        fine = self.norm1(x, voxels, silu=True)
        h, coarse = mean_pool(fine, voxels, 2)
        h = self.conv1(h, coarse)
        if self.place is not None:
            h = h + self.place(side_by_side(fine, voxels))
        h = self.conv2(self.norm2(h, coarse, silu=True), coarse)
        return h + self.skip(mean_pool(x, voxels, 2)[0]), coarse


class UpBlock(nn.Module):
    """From resolution R to 2 R: all eight children of every voxel."""

    def __init__(self, in_channels: int, out_channels: int, voxel_place: bool):
        super().__init__()
        self.conv1 = SubmanifoldConv3d(in_channels, out_channels)
        self.conv2 = SubdivideConv3d(out_channels, out_channels, voxel_place)

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(N, in_channels) -> (8 N, out_channels), children in rows 8 n + child, which `Voxels.child_order` sorts."""
        return F.silu(self.conv2(F.silu(self.conv1(x, voxels)), voxels))


class Encoder(nn.Module):
    def __init__(self, config: SDFVAEConfig):
        super().__init__()
        widths, groups = config.widths, config.group_norm_groups
        self.sdf_layer = nn.Linear(1, widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[i], widths[i + 1], groups, config.voxel_place) for i in range(3)
        )
        self.input_layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.blocks = nn.ModuleList(WindowBlock(config, i) for i in range(config.encoder_depth))
        self.norm = LayerNorm32(config.hidden_size, eps=1e-5)
        self.out_layer = nn.Linear(config.hidden_size, 2 * config.latent_channels)

    def forward(self, sdf: Tensor, voxels: Voxels, position_factor: float, run) -> tuple[Tensor, Voxels]:
        """sdf (N, 1) -> moments (L, 2 E) and the latent voxels; `run(block, x, voxels)` calls a block."""
        x = self.sdf_layer(sdf)  # (N, C / 16)
        coarse = voxels
        for _ in self.down_blocks:  # first, so that the neighbours on each grid follow from the coarser grid
            coarse = coarse.coarsen(2)[0]
        for block in self.down_blocks:
            x, voxels = run(block, x, voxels)
        x = _embed(x, voxels, self.input_layer, position_factor)  # (L, C)
        for block in self.blocks:
            x = run(block, x, voxels)
        return self.out_layer(self.norm(x)), voxels  # (L, 2 E)


class Decoder(nn.Module):
    def __init__(self, config: SDFVAEConfig):
        super().__init__()
        widths = config.widths
        self.input_layer = nn.Linear(config.latent_channels, config.hidden_size)
        self.blocks = nn.ModuleList(WindowBlock(config, i) for i in range(config.decoder_depth))
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[i + 1], widths[i], config.voxel_place) for i in reversed(range(3))
        )
        self.out_layer = nn.Linear(widths[0], 1)

    def forward(self, latents: Tensor, voxels: Voxels, position_factor: float, run, part=None):
        """latents (L, E) -> features (512 L, C / 16), the order that sorts them, and the voxels in that order."""
        x = _embed(latents, voxels, self.input_layer, position_factor)  # (L, C)
        for block in self.blocks:
            x = run(block, x, voxels)
        if part is not None:
            rows, voxels = part
            x = x[rows]
        order = None
        for block in self.up_blocks:
            x = x if order is None else permute_rows(x, order)
            x, order, voxels = run(block, x, voxels), voxels.child_order, voxels.subdivide()[0]
        return x, order, voxels


class SDFVAE(nn.Module):
    """The SS-VAE. Set `gradient_checkpointing` to recompute every block in the backward pass."""

    def __init__(self, config: SDFVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.gradient_checkpointing = False
        self.apply(initialize_linear)
        for block in self.encoder.down_blocks:
            if block.place is not None:
                nn.init.zeros_(block.place.weight)

    def encode(
        self, sdf: Tensor, voxels: Voxels, position_factor: float | None = None
    ) -> tuple[Tensor, Tensor, Voxels]:
        """Compress the SDF of the narrow band.

        Args:
            sdf: (N, 1), distance over the band, in [-1, 1], negative inside.
            voxels: the active voxels at resolution R, which 8 divides.
            position_factor: factor on latent coordinates. Default: position_resolution / R.

        Returns:
            mean (L, E) and logvar (L, E) in [-30, 20] of the posterior, float32, and the latent voxels at R / 8.

        Raises:
            ValueError: if sdf and voxels do not fit together, or 8 does not divide R.
        """
        if sdf.shape != (len(voxels), 1):
            raise ValueError(f"expected sdf ({len(voxels)}, 1), got {tuple(sdf.shape)}")
        if voxels.resolution % FACTOR:
            raise ValueError(f"expected a resolution divisible by {FACTOR}, got {voxels.resolution}")
        if position_factor is None:
            position_factor = self.config.position_resolution / voxels.resolution
        sdf = sdf.to(self.encoder.sdf_layer.weight.dtype)
        moments, latent_voxels = self.encoder(sdf, voxels, position_factor, self._run)
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0), latent_voxels

    def decode(
        self,
        latents: Tensor,
        voxels: Voxels,
        position_factor: float | None = None,
        part: tuple[Tensor, Voxels] | None = None,
    ) -> tuple[Tensor, Voxels]:
        """Reconstruct all 8³ SDF voxels of every latent.

        Args:
            latents: (L, E), as the encoder returns them (not normalised).
            voxels: their voxels at R / 8.
            position_factor: factor on latent coordinates. Default: position_resolution / R.
            part: the rows (P,) of the latents to upsample, and their voxels; the transformer still sees all latents.
                Default: all of them, P = L.

        Returns:
            sdf (512 P, 1) float32 in [-1, 1], and its voxels at R, sorted: block i of `sdf.view(P, 8, 8, 8)` lies at
            `block_coords[i]` of those voxels.

        Raises:
            ValueError: if latents and voxels do not fit together.
        """
        features, order, fine = self._decode_features(latents, voxels, position_factor, part)
        return self._sdf_of(features, order), fine

    def decode_with_features(
        self, latents: Tensor, voxels: Voxels, position_factor: float | None = None
    ) -> tuple[Tensor, Tensor, Voxels]:
        """Return sdf, the features before the output layer (512 L, C / 16), and their voxels.

        Arguments and errors as for `decode`.
        """
        features, order, fine = self._decode_features(latents, voxels, position_factor)
        return self._sdf_of(features, order), permute_rows(features, order), fine

    def _decode_features(
        self, latents: Tensor, voxels: Voxels, position_factor: float | None, part=None
    ) -> tuple[Tensor, Tensor, Voxels]:
        """Return the features before the output layer, not yet sorted, the order that sorts them, and their voxels."""
        if latents.shape != (len(voxels), self.config.latent_channels):
            raise ValueError(
                f"expected latents ({len(voxels)}, {self.config.latent_channels}), got {tuple(latents.shape)}"
            )
        if position_factor is None:
            position_factor = self.config.position_resolution / (FACTOR * voxels.resolution)
        latents = latents.to(self.decoder.input_layer.weight.dtype)
        return self.decoder(latents, voxels, position_factor, self._run, part)

    def _sdf_of(self, features: Tensor, order: Tensor) -> Tensor:
        return permute_rows(self.decoder.out_layer(features).float().tanh(), order)

    def forward(
        self, sdf: Tensor, voxels: Voxels, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Voxels, Tensor, Tensor]:
        """Encode, sample the posterior, decode: the training pass.

        `generator` draws the noise, on its own device. Returns sdf (512 L, 1), its voxels, mean and logvar (L, E).
        """
        mean, logvar, latent_voxels = self.encode(sdf, voxels)
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device).to(mean.device)
        decoded, fine = self.decode(mean + (0.5 * logvar).exp() * noise, latent_voxels)
        return decoded, fine, mean, logvar

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Turn latents (L, E) of the encoder into those that the diffusion model takes."""
        return (latents - self.config.latents_shift) * self.config.latents_scale

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Turn latents (L, E) of the diffusion model into those that `decode` takes."""
        return latents / self.config.latents_scale + self.config.latents_shift

    def _run(self, block: nn.Module, x: Tensor, voxels: Voxels):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, voxels, use_reentrant=False)
        return block(x, voxels)


def _embed(x: Tensor, voxels: Voxels, layer: nn.Linear, position_factor: float) -> Tensor:
    """Project x (L, ·) to (L, C) and add the embedding of the latent coordinates, in the dtype of the parameters."""
    embedding = voxels.position_embedding(layer.out_features, position_factor)
    return layer(x) + embedding.to(layer.weight.dtype)
