"""The sockets of this pack, and what travels through each: frozen dataclasses with tensors on the CPU.

Outputs are cached and shared between nodes, so nothing here is ever changed in place. Geometry travels as coordinates:
each node makes its own `Voxels` of them, whose tables would otherwise stay in ComfyUI's cache.

Sizes:
    N  latent voxels, all samples packed      B  samples      M  occupied 8³ blocks of the SDF grid, all samples packed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

if TYPE_CHECKING:
    from ..d3ds2.pipeline import Pipeline
    from ..d3ds2.voxels import Voxels

ModelSocket = io.Custom("D3DS2_MODEL")
StructureSocket = io.Custom("D3DS2_STRUCTURE")
LatentSocket = io.Custom("D3DS2_LATENT")
SDFSocket = io.Custom("D3DS2_SDF")
BackgroundRemovalSocket = io.Custom("BACKGROUND_REMOVAL")  # core's since 0.20.1; by name, so that older ones load us

CATEGORY = "3d/direct3d-s2"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Model:
    """A loaded model: its networks belong to ComfyUI's memory manager, each in a ModelPatcher of its own."""

    name: str
    pipeline: Pipeline
    patchers: dict[str, Any]  # network name -> ModelPatcher

    @property
    def patcher(self) -> Any:
        """The largest network's, where ComfyUI looks for one."""
        return self.patchers["latent_dit"]

    def get_models(self) -> list[Any]:
        """All of them, for ComfyUI's book-keeping."""
        return list(self.patchers.values())

    @property
    def latent_space(self) -> tuple[str, Any]:
        """What a latent to be decoded here was made for: the model's name and its SDF VAE's configuration."""
        return self.name, self.pipeline.sdf_vae.config

    @property
    def resolution(self) -> int:
        """Of structures: voxels per edge."""
        return self.pipeline.sampling.sdf_resolution // 8


@dataclass(frozen=True)
class Structure:
    """Occupied latent voxels: coords (N, 4) int32 [sample, x, y, z], sorted as `Voxels` are."""

    coords: torch.Tensor
    resolution: int
    batch_size: int

    def voxels(self) -> Voxels:
        from ..d3ds2.voxels import Voxels

        return Voxels(self.coords, self.resolution, self.batch_size)


@dataclass(frozen=True)
class Latent:
    """Latents (N, E) float32 of a structure, as the VAE named in `made_for` decodes them."""

    latents: torch.Tensor
    structure: Structure
    made_for: tuple[str, Any]  # the model's name and the configuration of its SDF VAE


@dataclass(frozen=True)
class SDF:
    """Signed distances over the band: values (M, 8, 8, 8) float32, negative inside; block_coords (M, 4) int32."""

    values: torch.Tensor
    block_coords: torch.Tensor
    resolution: int
    batch_size: int
