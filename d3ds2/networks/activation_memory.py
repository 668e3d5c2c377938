"""How many bytes a network needs beside its weights, from its configuration and the number of tokens.

The numbers are fits to peaks measured with torch's memory profiler on the definitions (tests/test_activation_memory.py
measures them again), with a fifth on top. They serve to make room in time and to refuse early, not to fill a card.

    T  tokens of one pass, both guidance branches counted     N  SDF voxels
"""

import torch

from .image_encoder import ImageEncoderConfig
from .latent_dit import LatentDiTConfig
from .sdf_vae import SDFVAEConfig
from .structure_dit import StructureDiTConfig
from .structure_vae import StructureVAEConfig

MARGIN = 1.2
WORKSPACE = 16 << 20  # bytes, of libraries and of what does not grow


def image_encoder_bytes(config: ImageEncoderConfig, images: int, dtype: torch.dtype) -> int:
    """Of encoding `images` pictures at once."""
    tokens = (config.image_size // config.patch_size) ** 2 * images
    return _with_margin(22 * tokens * config.hidden_size * dtype.itemsize)


def structure_dit_bytes(config: StructureDiTConfig, branches: int, dtype: torch.dtype) -> int:
    """Of one step with `branches` (1, or 2 with guidance) for each sample."""
    return _with_margin(16 * branches * config.resolution**3 * config.hidden_size * dtype.itemsize)


def structure_vae_bytes(config: StructureVAEConfig, latent_resolution: int, dtype: torch.dtype) -> int:
    """Of decoding one structure from latents (1, E, latent_resolution, ...)."""
    finest = (latent_resolution * config.factor) ** 3 * config.decoder_widths[-1]
    return _with_margin(32 * finest * dtype.itemsize)


def latent_dit_bytes(config: LatentDiTConfig, tokens: int, dtype: torch.dtype) -> int:
    """Of one step over T tokens, those of the second guidance branch counted."""
    return _with_margin(16 * tokens * config.hidden_size * dtype.itemsize)


def sdf_encode_bytes(config: SDFVAEConfig, voxels: int, dtype: torch.dtype) -> int:
    """Of encoding N active SDF voxels: the first group norm and pooling, with what they take apart in float32."""
    side_by_side = 3 * dtype.itemsize if config.voxel_place else 0  # of 8 children's places about 2.5 are taken
    return _with_margin(voxels * (120 + config.widths[0] * (dtype.itemsize + 12 + side_by_side)))


def _with_margin(size: float) -> int:
    return int(MARGIN * size) + WORKSPACE
