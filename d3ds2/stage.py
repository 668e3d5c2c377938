"""A stage: the networks that turn a structure into a surface, and how its latents are sampled.

A model has one stage or two. The first takes its structure from the image, the second from the mesh of the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .generation_error import empty_result
from .geometry.voxels import Voxels
from .meshes.mesh import Mesh
from .meshes.mesh_to_sdf import normalize_mesh
from .meshes.mesh_to_structure import mesh_to_structure
from .networks.latent_dit import LatentDiT, has_surface
from .networks.refiner import Refiner, SignRefiner
from .networks.sdf_vae import FACTOR, SDFVAE
from .storage.model_folder import ModelFolderError, SamplingConfig

STAGES = ("image", "structure", "latents", "sdf", "mesh")  # what progress reports, in turn
FINE_STAGES = ("fine structure", "fine latents", "fine sdf", "fine mesh")  # and then, in a model of two stages
LATENT_STREAM = 0x5EED_0F_1A7E57  # so that the noises of one seed have nothing in common
FINE_LATENT_STREAM = 0x5EED_0F_F1E1A7


@dataclass(frozen=True)
class Stage:
    """The networks of one resolution and how its latents are sampled.

    Args:
        prefix: of its networks' names in a model folder.
        progress: the names of its structure, latents, sdf and mesh in progress reports.
        noise_stream: is mixed into every seed.
        sdf_resolution: voxels per edge of its SDF.
        steps, shift, guidance_scale: of the sampler.
        refiner: of the decoded SDF. A `Refiner` also reads the decoder's features, a `SignRefiner` does not.
    """

    prefix: str
    progress: tuple[str, str, str, str]
    noise_stream: int
    sdf_resolution: int
    steps: int
    shift: float
    guidance_scale: float
    latent_dit: LatentDiT
    sdf_vae: SDFVAE
    refiner: Refiner | SignRefiner | None = None

    @property
    def resolution(self) -> int:
        """Latent voxels per edge."""
        return self.sdf_resolution // FACTOR

    @property
    def refines_with_features(self) -> bool:
        return isinstance(self.refiner, Refiner)

    def without_surplus(self, latents: Tensor, voxels: Voxels) -> tuple[Tensor, Voxels]:
        """Leave out the voxels whose latents say that no surface is there, see `LatentDiTConfig.surplus_value`.

        Args:
            latents: (N, E) as the SDF VAE decodes them, on the device of the voxels.
            voxels: the structure that they were sampled for.

        Raises:
            EmptyResultError: no voxel of some sample is left.
        """
        value = self.latent_dit.config.surplus_value
        if not value:
            return latents, voxels
        kept = has_surface(self.sdf_vae.normalize_latents(latents.float()), value)
        if kept.all():
            return latents, voxels
        left = Voxels(voxels.coords[kept], voxels.resolution, voxels.batch_size, check=False)
        if 0 in left.counts:
            raise empty_result("latents", left.counts.index(0), left.batch_size)
        return latents[kept], left

    def voxelize(self, meshes: Sequence[Mesh]) -> Voxels:
        """Return a structure for this stage from meshes: one sample for each.

        As in the released pipeline, a mesh is scaled to 0.95 of the cube, and a latent voxel within four SDF voxels of
        its surface is occupied.
        """
        samples = []
        for i, mesh in enumerate(meshes):
            blocks = torch.from_numpy(mesh_to_structure(normalize_mesh(mesh.vertices), mesh.faces, self.sdf_resolution))
            samples.append(torch.nn.functional.pad(blocks, (1, 0), value=i))
        return Voxels.sort(torch.cat(samples), self.resolution, len(samples))[0]

    def sizes(self, hidden_size: int) -> list[tuple[str, int, int]]:
        """The sizes that must agree within the stage, and with the image encoder's: (name, expected, got)."""
        dit, vae = self.latent_dit.config, self.sdf_vae.config
        sizes = [
            (f"context_size of {self.prefix}latent_dit", hidden_size, dit.context_size),
            (f"latent_channels of {self.prefix}latent_dit", vae.latent_channels, dit.latent_channels),
        ]
        if isinstance(self.refiner, Refiner):
            channels = self.refiner.config.feature_channels
            sizes.append((f"feature_channels of {self.prefix}refiner", vae.widths[0], channels))
        return sizes


def stages_of(networks: Mapping[str, nn.Module], sampling: SamplingConfig) -> tuple[Stage, ...]:
    """The one or two stages of a model, from its networks by name.

    Raises:
        ModelFolderError: the second stage is there in part.
    """

    def own(prefix: str) -> dict[str, nn.Module | None]:
        return {name: networks.get(prefix + name) for name in ("latent_dit", "sdf_vae", "refiner")}

    how = sampling.latent_steps, sampling.latent_shift, sampling.latent_guidance
    first = Stage("", STAGES[1:], LATENT_STREAM, sampling.sdf_resolution, *how, **own(""))
    fine, fine_networks = sampling.fine, {"fine_latent_dit", "fine_sdf_vae"} & networks.keys()
    if fine is None and not fine_networks:
        return (first,)
    if fine is None or len(fine_networks) < 2:
        raise ModelFolderError("expected fine_latent_dit, fine_sdf_vae and sampling.fine all together")
    how = fine.steps, fine.shift, fine.guidance
    return first, Stage("fine_", FINE_STAGES, FINE_LATENT_STREAM, fine.sdf_resolution, *how, **own("fine_"))
