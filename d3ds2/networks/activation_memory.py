"""Estimates of the bytes that a network needs beside its weights, from its configuration and the number of tokens.

The factors fit peaks that torch's memory profiler measured on the CPU, plus a fifth. The tests of this file repeat the
measurement. The estimates are for freeing memory in time and for refusing early, not for filling a card.

Sizes named in this file:
    T  tokens of one pass, those of the second guidance branch included      N  SDF voxels
"""

import torch

from ..kernels.gather_conv_chunks import GATHER_BYTES
from ..kernels.spatial_sparse_attention import workspace_bytes
from .image_encoder import ImageEncoderConfig
from .latent_dit import LatentDiTConfig
from .sdf_vae import SDFVAEConfig
from .structure_dit import StructureDiTConfig
from .structure_vae import StructureVAEConfig

MARGIN = 1.2
WORKSPACE = (16 << 20) + GATHER_BYTES  # bytes for libraries and for all that does not grow with the input


def image_encoder_bytes(config: ImageEncoderConfig, images: int, dtype: torch.dtype) -> int:
    """Estimate the bytes for encoding `images` images at once."""
    tokens = (config.image_size // config.patch_size) ** 2 * images
    return _with_margin(22 * tokens * config.hidden_size * dtype.itemsize)


def image_tokens_bytes(config: ImageEncoderConfig, images: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that the tokens of `images` views of an object take while a transformer samples.

    Every view keeps its tokens, the zeros of the second guidance branch, and both as one batch.
    """
    patches = (config.image_size // config.patch_size) ** 2
    tokens = (1 + config.num_registers + patches) * images
    return int(MARGIN * 4 * tokens * (config.hidden_size * dtype.itemsize + 17))  # 17: coordinates and foreground


def structure_dit_bytes(config: StructureDiTConfig, branches: int, dtype: torch.dtype) -> int:
    """Estimate the bytes for one step with `branches` passes: 1 for each sample, or 2 with guidance."""
    return _with_margin(16 * branches * config.resolution**3 * config.hidden_size * dtype.itemsize)


def structure_vae_bytes(config: StructureVAEConfig, latent_resolution: int, dtype: torch.dtype) -> int:
    """Estimate the bytes for decoding one structure from a cube of latents, `latent_resolution` along each edge."""
    finest = (latent_resolution * config.factor) ** 3 * config.decoder_widths[-1]
    return _with_margin(32 * finest * dtype.itemsize)


def latent_dit_bytes(config: LatentDiTConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Estimate the bytes for one step over T tokens on a device, those of the second guidance branch included."""
    return _with_margin(16 * tokens * config.hidden_size * dtype.itemsize) + workspace_bytes(device)


def sdf_encode_bytes(config: SDFVAEConfig, voxels: int, dtype: torch.dtype) -> int:
    """Estimate the bytes for encoding N active SDF voxels: their features at full resolution take most."""
    side_by_side = 3 * dtype.itemsize if config.voxel_place else 0  # about 2.5 of 8 children are occupied
    return _with_margin(voxels * (120 + config.widths[0] * (dtype.itemsize + 12 + side_by_side)))


def _with_margin(size: float) -> int:
    return int(MARGIN * size) + WORKSPACE
