"""The sockets of this pack, and the type that travels through each: frozen dataclasses with tensors on the CPU.

ComfyUI caches outputs and shares them between nodes, so nothing here is ever changed in place. Geometry travels as
coordinates: each node makes its own `Voxels` from them, because the tables of shared `Voxels` would stay in ComfyUI's
cache. Newer versions of ComfyUI measure what they cache with `_comfy_cache_tensors`.

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
    from ...d3ds2.meshes.placement import Placement
    from ...d3ds2.pipeline import Pipeline, Stage

ModelSocket = io.Custom("D3DS2_MODEL")
StructureSocket = io.Custom("D3DS2_STRUCTURE")
LatentSocket = io.Custom("D3DS2_LATENT")
SDFSocket = io.Custom("D3DS2_SDF")
BackgroundRemovalSocket = io.Custom("BACKGROUND_REMOVAL")  # in core since 0.20.1; a name also works before

CATEGORY = "3d/direct3d-s2"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def sampling_inputs(seed_tooltip: str) -> list[io.Input]:
    """Return the inputs of every sampling node: seed, steps and guidance_scale."""
    return [
        io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=seed_tooltip),
        io.Int.Input("steps", default=0, min=0, max=200, tooltip="The number of steps; 0 uses the model's default."),
        io.Float.Input(
            "guidance_scale",
            default=0.0,
            min=0.0,
            max=20.0,
            step=0.1,
            tooltip="How closely the result follows the image. 1 turns guidance off and halves the time; 0 "
            "uses the model's default.",
        ),
    ]


def structure_outputs() -> list[io.Output]:
    """Return the outputs of every node that makes a structure: itself, its VOXEL, its size as text and as a number."""
    return [
        StructureSocket.Output("structure", tooltip="For SSA-DiT Sample."),
        io.Voxel.Output(
            "voxel", tooltip="The structure as ComfyUI's VOXEL. Connect it to Voxel to Mesh to look at it."
        ),
        io.String.Output("tokens", tooltip="The number of tokens that stage two will process, as text."),
        io.Int.Output("token_count", tooltip="The number of tokens; of a batch, that of the largest structure."),
    ]


@dataclass(frozen=True)
class Model:
    """A loaded model. ComfyUI's memory manager owns its networks, each in a ModelPatcher of its own."""

    name: str
    pipeline: Pipeline
    patchers: dict[str, Any]  # network name -> ModelPatcher

    @property
    def patcher(self) -> Any:
        """The largest network's ModelPatcher; ComfyUI looks for it under this name."""
        return self.patchers["latent_dit"]

    def get_models(self) -> list[Any]:
        """Return all ModelPatchers, for ComfyUI's bookkeeping."""
        return list(self.patchers.values())

    @property
    def stages(self) -> dict[int, Stage]:
        """The model's one or two stages, by the resolution of their structures; the finest comes last."""
        return {stage.resolution: stage for stage in self.pipeline.stages}

    def latent_space(self, resolution: int) -> tuple[str, Any]:
        """Return the model's name and the config of the SDF VAE that decodes latents of this resolution."""
        return self.name, self.stages[resolution].sdf_vae.config


@dataclass(frozen=True)
class Structure:
    """Occupied latent voxels: coords (N, 4) int32 [sample, x, y, z], in the order of `Voxels`; each sample has some.

    A structure that was made of meshes also has the place of each, so that what is decoded returns there.

    Raises ValueError for coords of another kind.
    """

    coords: torch.Tensor
    resolution: int
    batch_size: int
    places: tuple[Placement, ...] = ()

    def place_of(self, index: int) -> Placement:
        """Return where the mesh of a sample belongs: where it came from, else in core's box [-0.5, 0.5]³."""
        from ...d3ds2.meshes.placement import HALF_BOX

        return self.places[index] if self.places else HALF_BOX

    def __post_init__(self) -> None:
        if self.coords.ndim != 2 or self.coords.shape[1] != 4 or self.coords.dtype != torch.int32:
            raise ValueError(f"expected coords (N, 4) int32, got {self.coords.dtype} {tuple(self.coords.shape)}")
        if self.coords[:, 0].unique_consecutive().tolist() != list(range(self.batch_size)) or not self.batch_size:
            raise ValueError(f"expected voxels of each of {self.batch_size} samples, in turn")

    def voxels(self) -> Voxels:
        """Return new `Voxels` with these coordinates."""
        from ...d3ds2.geometry.voxels import Voxels

        return Voxels(self.coords, self.resolution, self.batch_size)

    def _comfy_cache_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.coords,)


@dataclass(frozen=True)
class Latent:
    """Latents (N, E) float32 of a structure, for the VAE that `made_for` identifies. Raises ValueError if N differs."""

    latents: torch.Tensor
    structure: Structure
    made_for: tuple[str, Any]  # the model's name and the config of its SDF VAE

    def __post_init__(self) -> None:
        if self.latents.ndim != 2 or len(self.latents) != len(self.structure.coords):
            raise ValueError(
                f"expected latents (N, E) of the structure's {len(self.structure.coords)} voxels, got "
                f"{tuple(self.latents.shape)}"
            )

    def _comfy_cache_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.latents, self.structure.coords


@dataclass(frozen=True)
class SDF:
    """Signed distances near the surface: values (M, 8, 8, 8) float32, distance over the band, negative inside.

    block_coords (M, 4) int32 are [sample, x, y, z] in blocks; resolution is SDF voxels per edge.
    """

    values: torch.Tensor
    block_coords: torch.Tensor
    resolution: int
    batch_size: int

    def _comfy_cache_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.values, self.block_coords
