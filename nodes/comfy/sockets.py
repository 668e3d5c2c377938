"""The sockets of this pack, and what travels through each: frozen dataclasses with tensors on the CPU.

Outputs are cached and shared between nodes, so nothing here is ever changed in place. Geometry travels as coordinates:
each node makes its own `Voxels` of them, whose tables would otherwise stay in ComfyUI's cache. Newer versions weigh
what they cache by `_comfy_cache_tensors`.

Sizes:
    N  latent voxels, all samples packed      B  samples      M  occupied 8³ blocks of the SDF grid, all samples packed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

if TYPE_CHECKING:
    from ...d3ds2.geometry.voxels import Voxels
    from ...d3ds2.pipeline import Pipeline, Stage

ModelSocket = io.Custom("D3DS2_MODEL")
StructureSocket = io.Custom("D3DS2_STRUCTURE")
LatentSocket = io.Custom("D3DS2_LATENT")
SDFSocket = io.Custom("D3DS2_SDF")
BackgroundRemovalSocket = io.Custom("BACKGROUND_REMOVAL")  # core's since 0.20.1; by name, so that older ones load us

CATEGORY = "3d/direct3d-s2"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def sampling_inputs(seed_tooltip: str) -> list[io.Input]:
    """The inputs of every sampling node: seed, steps and guidance_scale; 0 takes the model's own value."""
    return [
        io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=seed_tooltip),
        io.Int.Input("steps", default=0, min=0, max=200, tooltip="Euler steps; 0 takes the model's own number."),
        io.Float.Input(
            "guidance_scale",
            default=0.0,
            min=0.0,
            max=20.0,
            step=0.1,
            tooltip="How strongly the image guides; 1 switches guidance off and halves the time; 0 takes the model's "
            "own value.",
        ),
    ]


def structure_outputs() -> list[io.Output]:
    """The outputs of every node that makes a structure: the structure, core's VOXEL of it, and its size as text."""
    return [
        StructureSocket.Output("structure", tooltip="For SSA-DiT Sample."),
        io.Voxel.Output("voxel", tooltip="The same as core VOXEL, for Voxel to Mesh and a look at it."),
        io.String.Output("tokens", tooltip="How many tokens stage two will work on, as text."),
    ]


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
    def stages(self) -> dict[int, Stage]:
        """Its one or two stages, by the resolution of their structures; the finest comes last."""
        return {stage.resolution: stage for stage in self.pipeline.stages}

    def latent_space(self, resolution: int) -> tuple[str, Any]:
        """The model's name and the configuration of the SDF VAE that decodes latents of this resolution."""
        return self.name, self.stages[resolution].sdf_vae.config


@dataclass(frozen=True)
class Structure:
    """Occupied latent voxels: coords (N, 4) int32 [sample, x, y, z], sorted as `Voxels` are."""

    coords: torch.Tensor
    resolution: int
    batch_size: int

    def voxels(self) -> Voxels:
        from ...d3ds2.geometry.voxels import Voxels

        return Voxels(self.coords, self.resolution, self.batch_size)

    def _comfy_cache_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.coords,)


@dataclass(frozen=True)
class Latent:
    """Latents (N, E) float32 of a structure, as the VAE named in `made_for` decodes them."""

    latents: torch.Tensor
    structure: Structure
    made_for: tuple[str, Any]  # the model's name and the configuration of its SDF VAE

    def _comfy_cache_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.latents, self.structure.coords


@dataclass(frozen=True)
class SDF:
    """Signed distances over the band: values (M, 8, 8, 8) float32, negative inside; block_coords (M, 4) int32."""

    values: torch.Tensor
    block_coords: torch.Tensor
    resolution: int
    batch_size: int

    def _comfy_cache_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.values, self.block_coords
