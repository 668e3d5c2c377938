"""The structure autoencoder: a dense grid that says which latent voxels are occupied <-> a small latent volume.

Occupancy (B, 1, S, S, S) becomes latents (B, E, S/4, S/4, S/4). Each width of the config after the first halves the
grid; the released VAE has three. The architecture is that of the released dense VAE. Volumes are indexed [x, y, z].

Sizes named in this file:
    B  samples      S  occupancy voxels per edge      E  latent channels      C  channels of a layer
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..geometry.voxels import Voxels
from .sizes import check_sizes

FACE_NEIGHBORS = (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1)))  # kernels and their padding


def widened(logits: Tensor) -> Tensor:
    """Give each voxel (B, 1, S, S, S) the highest logit among itself and its neighbours across faces."""
    return torch.stack([F.max_pool3d(logits, kernel, 1, padding) for kernel, padding in FACE_NEIGHBORS]).amax(0)


@dataclass(frozen=True)
class StructureVAEConfig:
    """Sizes of the structure VAE; the defaults are the released ones.

    `encoder_widths` lead from the finest grid to the latents, `decoder_widths` back. A voxel is occupied if its
    probability reaches `threshold`. `latents_scale` and `latents_shift` normalise latents for the diffusion model.
    Raises ValueError for sizes that do not fit together.
    """

    latent_channels: int = 8
    encoder_widths: tuple[int, ...] = (32, 128, 512)
    decoder_widths: tuple[int, ...] = (512, 128, 64)
    encoder_res_blocks: int = 2
    encoder_middle_blocks: int = 2
    decoder_res_blocks: int = 4
    decoder_middle_blocks: int = 4
    latents_scale: float = 1.0
    latents_shift: float = 0.0
    threshold: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder_widths", tuple(self.encoder_widths))  # JSON and TOML hold lists
        object.__setattr__(self, "decoder_widths", tuple(self.decoder_widths))
        check_sizes(self)
        if not self.encoder_widths or len(self.encoder_widths) != len(self.decoder_widths):
            raise ValueError(
                f"expected as many encoder_widths as decoder_widths, at least one, got {self.encoder_widths} and "
                f"{self.decoder_widths}"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"expected a threshold between 0 and 1, got {self.threshold}")
        if self.latents_scale == 0:
            raise ValueError("expected latents_scale other than 0")

    @property
    def factor(self) -> int:
        """Occupancy voxels along the edge of a latent voxel."""
        return 2 ** (len(self.encoder_widths) - 1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a volume (B, C, X, Y, Z), with statistics in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        normed = F.layer_norm(x.movedim(1, -1).to(dtype), self.normalized_shape, weight, bias, self.eps)
        return normed.to(x.dtype).movedim(-1, 1)


class ResBlock(nn.Module):
    """Two convolutions and a skip: (B, C, X, Y, Z) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.norm2 = ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halve the grid by a 2³ convolution with stride 2: (B, ·, X, Y, Z) -> (B, ·, X/2, Y/2, Z/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the grid by a convolution to 8 · out_channels: (B, ·, X, Y, Z) -> (B, ·, 2 X, 2 Y, 2 Z).

    Channel 8 c + 4 i + 2 j + k of the convolution is channel c of child (i, j, k).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # (B, C, i, j, k, X, Y, Z)
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Encoder(nn.Module):
    """Occupancy (B, 1, S, S, S) in -1 and 1 -> mean and logvar side by side, (B, 2 E, S/4, S/4, S/4)."""

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        widths = config.encoder_widths
        self.input_conv = nn.Conv3d(1, widths[0], 3, padding=1)
        self.blocks = _levels(widths, config.encoder_res_blocks, Downsample)
        self.middle_blocks = nn.ModuleList(ResBlock(widths[-1]) for _ in range(config.encoder_middle_blocks))
        self.out_norm = ChannelNorm(widths[-1])
        self.out_conv = nn.Conv3d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, run) -> Tensor:
        x = self.input_conv(x)
        for block in itertools.chain(self.blocks, self.middle_blocks):
            x = run(block, x)
        return self.out_conv(F.silu(self.out_norm(x)))


class Decoder(nn.Module):
    """Latents (B, E, S/4, S/4, S/4) -> occupancy logits (B, 1, S, S, S)."""

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        widths = config.decoder_widths
        self.input_conv = nn.Conv3d(config.latent_channels, widths[0], 3, padding=1)
        self.middle_blocks = nn.ModuleList(ResBlock(widths[0]) for _ in range(config.decoder_middle_blocks))
        self.blocks = _levels(widths, config.decoder_res_blocks, Upsample)
        self.out_norm = ChannelNorm(widths[-1])
        self.out_conv = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor, run) -> Tensor:
        x = self.input_conv(x)
        for block in itertools.chain(self.middle_blocks, self.blocks):
            x = run(block, x)
        return self.out_conv(F.silu(self.out_norm(x)))


def _levels(widths: tuple[int, ...], num_res_blocks: int, resample: type[nn.Module]) -> nn.ModuleList:
    """Return the residual blocks of all widths in one flat list, with a resampler between two widths."""
    blocks = []
    for i, width in enumerate(widths):
        blocks += [ResBlock(width) for _ in range(num_res_blocks)]
        if i + 1 < len(widths):
            blocks.append(resample(width, widths[i + 1]))
    return nn.ModuleList(blocks)


class StructureVAE(nn.Module):
    """The structure VAE. Set `gradient_checkpointing` to recompute every block in the backward pass."""

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.gradient_checkpointing = False
        self.apply(_initialize)

    def encode(self, occupancy: Tensor) -> tuple[Tensor, Tensor]:
        """Compress a structure.

        Args:
            occupancy: (B, 1, S, S, S), 1 or True where occupied, else 0; `config.factor` divides S.

        Returns:
            mean and logvar of the posterior, (B, E, S/4, S/4, S/4) float32, logvar in [-30, 20].

        Raises:
            ValueError: for another shape.
        """
        shape, factor = tuple(occupancy.shape), self.config.factor
        if len(shape) != 5 or shape[1] != 1 or any(size % factor for size in shape[2:]):
            raise ValueError(f"expected occupancy (B, 1, S, S, S), S divisible by {factor}, got {shape}")
        signed = occupancy.to(self.encoder.input_conv.weight.dtype) * 2 - 1
        mean, logvar = self.encoder(signed, self._run).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, E, S/4, S/4, S/4), as the encoder returns them -> occupancy logits (B, 1, S, S, S) float32.

        Raises ValueError for another shape.
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"expected latents (B, {self.config.latent_channels}, X, Y, Z), got {tuple(latents.shape)}"
            )
        return self.decoder(latents.to(self.decoder.input_conv.weight.dtype), self._run).float()

    def occupied(self, logits: Tensor, threshold: float | None = None, widen: int = 0) -> Voxels:
        """Return the voxels whose probability is at least `threshold` (default: the config's).

        Args:
            logits: (B, 1, S, S, S).
            widen: layers of voxels that are added around them, across faces.
        """
        threshold = self.config.threshold if threshold is None else threshold
        for _ in range(widen):
            logits = widened(logits)
        coords = (logits[:, 0].sigmoid() >= threshold).nonzero()  # (N, 4): batch, x, y, z
        return Voxels.sort(coords, logits.shape[-1], len(logits))[0]

    def forward(self, occupancy: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, sample the posterior, decode: the training pass.

        `generator` draws the noise, on its own device. Returns logits (B, 1, S, S, S), and mean and logvar as `encode`.
        """
        mean, logvar = self.encode(occupancy)
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device).to(mean.device)
        return self.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Turn latents (B, E, S/4, S/4, S/4) of the encoder into those that the diffusion model takes."""
        return (latents - self.config.latents_shift) * self.config.latents_scale

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Turn latents (B, E, S/4, S/4, S/4) of the diffusion model into those that `decode` takes."""
        return latents / self.config.latents_scale + self.config.latents_shift

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def _initialize(module: nn.Module) -> None:
    """Start with convolutions that keep the variance, and with residual branches at zero."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)
    if isinstance(module, ResBlock):
        nn.init.zeros_(module.conv2.weight)
