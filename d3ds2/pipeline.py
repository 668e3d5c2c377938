"""One image -> one mesh: the whole path, a method for each stage.

    pipeline = load_pipeline("d3ds2/weights/tiny")
    mesh = pipeline.generate(load_image("chair.png"), seed=0)

Each stage runs on the device and in the dtype of its own network, and moves what it is given there; noise is drawn on
the CPU, for each sample from its own seed. A model of two stages voxelises the mesh of the first one anew, samples
latents for it and decodes those; `sample_latents` and the decoding know the stage by the resolution of the voxels.

Sizes named in this file:
    B  images      L  image tokens, all images packed      N  latent voxels, all samples packed
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .generation_error import EmptyResultError, GenerationError, empty_result
from .geometry.sdf_blocks import SDFBlocks
from .geometry.voxels import Voxels
from .images.foreground import cut_out, preprocess
from .meshes.mesh import Mesh
from .meshes.mesh_to_sdf import normalize_mesh
from .meshes.mesh_to_structure import mesh_to_structure
from .meshes.sdf_to_mesh import DECODED_OPTIONS
from .meshes.sdf_to_mesh_gpu import blocks_to_mesh
from .networks.chunked_decode import OnChunk, decode_in_chunks
from .networks.image_encoder import ImageEncoder, ImageTokens
from .networks.latent_dit import LatentDiT
from .networks.model_files import load_model
from .networks.refined_blocks import OnPatch, refine_blocks
from .networks.refiner import Refiner, SignRefiner
from .networks.sdf_vae import FACTOR, SDFVAE
from .networks.structure_dit import StructureDiT
from .networks.structure_vae import StructureVAE
from .offload import on_device
from .rectified_flow import OnStep, euler_sample, guided_velocity, noise_for, time_schedule
from .storage.model_folder import ModelFolderError, SamplingConfig, network_names

TINY = Path(__file__).parent / "weights" / "tiny"  # the shipped model
STAGES = ("image", "structure", "latents", "sdf", "mesh")
FINE_STAGES = ("fine structure", "fine latents", "fine sdf", "fine mesh")  # of a model with a second stage
LATENT_STREAM = 0x5EED_0F_1A7E57  # so that the noises of one seed have nothing in common
FINE_LATENT_STREAM = 0x5EED_0F_F1E1A7
TOGETHER = 32768  # tokens of a sample up to which both guidance branches are one batch

__all__ = ["FINE_STAGES", "STAGES", "TINY", "EmptyResultError", "GenerationError", "Pipeline", "load_pipeline"]

OnProgress = Callable[[str, int, int], None]  # stage, finished steps, all steps


@dataclass
class Pipeline:
    """The networks of a model and how they are sampled.

    Args:
        fine_latent_dit, fine_sdf_vae: of a second stage; `sampling.fine` belongs to them.
        refiner, fine_refiner: of the decoded SDF of the first and the second stage.
        device: where each network is brought for its stage alone. Default: they stay where they are.
        memory_budget: bytes that decoding may take beside weights. Default: see `decode_in_chunks`.

    Raises:
        ModelFolderError: sizes that do not fit together.
    """

    image_encoder: ImageEncoder
    structure_vae: StructureVAE
    structure_dit: StructureDiT
    latent_dit: LatentDiT
    sdf_vae: SDFVAE
    sampling: SamplingConfig
    fine_latent_dit: LatentDiT | None = None
    fine_sdf_vae: SDFVAE | None = None
    refiner: Refiner | None = None
    fine_refiner: SignRefiner | None = None
    device: torch.device | str | None = None
    memory_budget: int | None = None

    def __post_init__(self):
        encoder, structure = self.image_encoder.config, self.structure_dit.config
        latent_resolution = structure.resolution * self.structure_vae.config.factor
        sizes = [
            ("context_size of structure_dit", encoder.hidden_size, structure.context_size),
            ("latent_channels of structure_dit", self.structure_vae.config.latent_channels, structure.latent_channels),
            ("sdf_resolution", FACTOR * latent_resolution, self.sampling.sdf_resolution),
        ]
        stages = ("", self.latent_dit, self.sdf_vae), ("fine_", self.fine_latent_dit, self.fine_sdf_vae)
        for prefix, dit, vae in stages:
            if ((dit is None) != (self.sampling.fine is None) and prefix) or (dit is None) != (vae is None):
                raise ModelFolderError("expected fine_latent_dit, fine_sdf_vae and sampling.fine all together")
            if dit is not None:
                channels = vae.config.latent_channels, dit.config.latent_channels
                sizes.append((f"context_size of {prefix}latent_dit", encoder.hidden_size, dit.config.context_size))
                sizes.append((f"latent_channels of {prefix}latent_dit", *channels))
        if self.refiner is not None:
            features = self.sdf_vae.config.widths[0], self.refiner.config.feature_channels
            sizes.append(("feature_channels of refiner", *features))
        for what, expected, got in sizes:
            if expected != got:
                raise ModelFolderError(f"the networks do not fit together: expected {what} {expected}, got {got}")

    def generate(
        self,
        image: Image.Image,
        seed: int = 0,
        on_progress: OnProgress | None = None,
        structure_steps: int | None = None,
        latent_steps: int | None = None,
        **options,
    ) -> Mesh:
        """One mesh of one image; see `generate_batch`, also for `options`."""
        return self.generate_batch([image], [seed], on_progress, structure_steps, latent_steps, **options)[0]

    def generate_batch(
        self,
        images: Sequence[Image.Image],
        seeds: Sequence[int],
        on_progress: OnProgress | None = None,
        structure_steps: int | None = None,
        latent_steps: int | None = None,
        fine_steps: int | None = None,
        fine: bool = True,
        use_refiners: bool = False,
    ) -> list[Mesh]:
        """A mesh of each image, all stages in turn.

        Args:
            images: RGB on a plain background, or RGBA as `cut_out` gives them.
            seeds: one for each image; it alone decides the noise of its sample.
            on_progress: called at the beginning of every stage, with 0 finished steps, and after every step of it.
            structure_steps, latent_steps, fine_steps: default: the model's.
            fine: go through the second stage, where the model has one.
            use_refiners: the model's refiners tell what is inside, instead of all that the outside does not reach.

        Returns:
            Meshes in [-1, 1]³, Y up, the object's front toward +Z.

        Raises:
            ImageError: no foreground in an image.
            GenerationError: nothing was made of an image.
            ModelFolderError: the model has no refiners.
        """
        report = on_progress or (lambda stage, step, steps: None)

        def on_step(stage: str, steps: int) -> OnStep:
            report(stage, 0, steps)
            return lambda step, x_t, x_0: report(stage, step + 1, steps)

        structure_steps = structure_steps or self.sampling.structure_steps
        stages = [("", latent_steps or self.sampling.latent_steps)]
        if fine and self.sampling.fine is not None:
            stages.append(("fine ", fine_steps or self.sampling.fine.steps))
        if use_refiners and None in (self.refiner, self.fine_refiner)[: len(stages)]:
            raise ModelFolderError("the model has no refiners for this")

        report("image", 0, 1)
        image_tokens = self.encode_image(images)
        report("image", 1, 1)

        meshes = []
        for prefix, steps in stages:
            if not meshes:
                told = on_step("structure", structure_steps)
                voxels = self.sample_structure(image_tokens, seeds, structure_steps, on_step=told)
            else:
                report("fine structure", 0, 1)
                voxels = self.structure_of(meshes)
                report("fine structure", 1, 1)

            told = on_step(f"{prefix}latents", steps)
            latents = self.sample_latents(voxels, image_tokens, seeds, steps, on_step=told)
            report(f"{prefix}sdf", 0, 1)
            blocks, level = self.decode_surface(latents, voxels, use_refiners)
            report(f"{prefix}sdf", 1, 1)
            report(f"{prefix}mesh", 0, 1)
            meshes = self.blocks_to_meshes(blocks, level=level)
            report(f"{prefix}mesh", 1, 1)
        return meshes

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> ImageTokens:
        """Cut out, crop, encode: all tokens of B images. Raises ImageError as `cut_out`."""
        size = self.image_encoder.config.image_size
        pixels = torch.stack([preprocess(cut_out(image), size) for image in images])  # (B, 4, S, S)
        with on_device(self.image_encoder, self.device) as device:
            return self.image_encoder(pixels.to(device, next(self.image_encoder.parameters()).dtype))

    @torch.no_grad()
    def sample_structure(
        self,
        image_tokens: ImageTokens,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> Voxels:
        """Which latent voxels are occupied.

        Args:
            image_tokens: all tokens of B images.
            seeds: one for each.
            steps, guidance_scale: default: the model's.
            on_step: called after every step, see `euler_sample`; may raise to stop.

        Returns:
            The occupied voxels of B samples, at an eighth of the SDF's resolution.

        Raises:
            EmptyResultError: no voxel is occupied in some sample.
        """
        R, E = self.structure_dit.config.resolution, self.structure_dit.config.latent_channels
        guidance_scale = self.sampling.structure_guidance if guidance_scale is None else guidance_scale
        noise = noise_for(list(seeds), [(1, E, R, R, R)] * image_tokens.batch_size)
        times = time_schedule(steps or self.sampling.structure_steps, self.sampling.structure_shift)
        with on_device(self.structure_dit, self.device) as device:
            options = {"half_times": self.sampling.half_times}
            velocity = guided_velocity(self.structure_dit, image_tokens.to(device), guidance_scale, **options)
            latents = euler_sample(velocity, noise.to(device), times, on_step)
        voxels = self.decode_structure(latents)
        if 0 in voxels.counts:
            raise empty_result("structure", voxels.counts.index(0), voxels.batch_size)
        return voxels

    @torch.no_grad()
    def decode_structure(self, latents: Tensor) -> Voxels:
        """What the structure DiT makes, (B, E, R, R, R) -> the voxels that it occupies, maybe none."""
        vae = self.structure_vae
        with on_device(vae, self.device) as device:
            return vae.occupied(vae.decode(vae.denormalize_latents(latents.to(device))))

    @torch.no_grad()
    def sample_latents(
        self,
        voxels: Voxels,
        image_tokens: ImageTokens,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The latents (N, E) of the structure's voxels, as `decode_sdf` takes them. Arguments as `sample_structure`."""
        dit, vae, sampling = self.latent_dit, self.sdf_vae, self.sampling
        defaults, stream = (sampling.latent_steps, sampling.latent_shift, sampling.latent_guidance), LATENT_STREAM
        if self.is_fine(voxels):
            dit, vae, sampling = self.fine_latent_dit, self.fine_sdf_vae, self.sampling.fine
            defaults, stream = (sampling.steps, sampling.shift, sampling.guidance), FINE_LATENT_STREAM
        context = image_tokens.select_foreground() if dit.config.sparse_context else image_tokens  # eq. 9
        E, (default_steps, shift, default_guidance) = dit.config.latent_channels, defaults
        guidance_scale = default_guidance if guidance_scale is None else guidance_scale
        noise = noise_for([seed ^ stream for seed in seeds], [(count, E) for count in voxels.counts])
        times = time_schedule(steps or default_steps, shift)
        options = {"together": max(voxels.counts) <= TOGETHER, "half_times": self.sampling.half_times}
        with on_device(dit, self.device) as device:
            velocity = guided_velocity(dit, context.to(device), guidance_scale, voxels.to(device), **options)
            return vae.denormalize_latents(euler_sample(velocity, noise.to(device), times, on_step))

    def is_fine(self, voxels: Voxels) -> bool:
        """Whether latent voxels are those of the model's second stage, by their resolution."""
        return self.sampling.fine is not None and FACTOR * voxels.resolution == self.sampling.fine.sdf_resolution

    def structure_of(self, meshes: Sequence[Mesh]) -> Voxels:
        """The structure of the second stage, from the meshes of the first: one sample for each.

        As the released pipeline, a mesh is scaled to 0.95 of the cube, and a latent voxel within four SDF voxels of
        its surface is occupied.
        """
        if self.sampling.fine is None:
            raise ModelFolderError("the model has no second stage")
        R = self.sampling.fine.sdf_resolution
        samples = []
        for i, mesh in enumerate(meshes):
            blocks = torch.from_numpy(mesh_to_structure(normalize_mesh(mesh.vertices), mesh.faces, R))
            samples.append(torch.nn.functional.pad(blocks, (1, 0), value=i))
        return Voxels.sort(torch.cat(samples), R // FACTOR, len(samples))[0]

    def decode_sdf(
        self, latents: Tensor, voxels: Voxels, memory_budget: int | None = None, on_chunk: OnChunk | None = None
    ) -> tuple[Tensor, Voxels]:
        """Latents (N, E) of the structure's voxels -> sdf (512 N, 1) in [-1, 1] on the voxels at 8 × the resolution."""
        return self.decode_blocks(latents, voxels, memory_budget, on_chunk).to_voxels()

    @torch.no_grad()
    def decode_blocks(
        self,
        latents: Tensor,
        voxels: Voxels,
        memory_budget: int | None = None,
        on_chunk: OnChunk | None = None,
        features_out: Tensor | None = None,
    ) -> SDFBlocks:
        """`decode_sdf` without the coordinates of voxels, which take more than all else; see `decode_in_chunks`."""
        vae = self.fine_sdf_vae if self.is_fine(voxels) else self.sdf_vae
        budget = self.memory_budget if memory_budget is None else memory_budget
        with on_device(vae, self.device) as device:
            latents, voxels = latents.to(device), voxels.to(device)
            return decode_in_chunks(vae, latents, voxels, budget, on_chunk=on_chunk, features_out=features_out)

    def decode_surface(
        self, latents: Tensor, voxels: Voxels, use_refiners: bool = False, on_patch: OnPatch | None = None
    ) -> tuple[SDFBlocks, float]:
        """The blocks that make the mesh, and the level of the surface in them: decoded and, if asked, refined.

        Raises:
            ModelFolderError: the model has no refiner of this stage.
        """
        level, is_fine = self.sampling.level, self.is_fine(voxels)
        if not use_refiners:
            return self.decode_blocks(latents, voxels), level
        refiner, features = self.fine_refiner if is_fine else self.refiner, None
        if refiner is None:
            raise ModelFolderError("the model has no refiner of this stage")
        if not is_fine:
            shape = FACTOR**3 * len(voxels), refiner.config.feature_channels
            device = self.device or next(self.sdf_vae.parameters()).device
            features = torch.empty(shape, dtype=next(self.sdf_vae.parameters()).dtype, device=device)
        decoded = self.decode_blocks(latents, voxels, features_out=features)
        level = level if is_fine else 2 * level  # as the released pipeline
        with on_device(refiner, self.device) as device:
            return refine_blocks(refiner, decoded, features, level, device, on_patch), level

    def to_mesh(
        self,
        sdf: Tensor,
        voxels: Voxels,
        min_component: float = DECODED_OPTIONS["min_component"],
        level: float | None = None,
        keep_largest: bool = False,
    ) -> list[Mesh]:
        """`blocks_to_meshes` of sdf and voxels as `decode_sdf` gives them."""
        return self.blocks_to_meshes(SDFBlocks.of_voxels(sdf, voxels), min_component, level, keep_largest)

    def blocks_to_meshes(
        self,
        blocks: SDFBlocks,
        min_component: float = DECODED_OPTIONS["min_component"],
        level: float | None = None,
        keep_largest: bool = False,
    ) -> list[Mesh]:
        """The surface at a level of each sample.

        Args:
            min_component, keep_largest: see `sdf_to_mesh`.
            level: default: the model's.

        Raises:
            EmptyResultError: a sample has no surface.
            GenerationError: values that are not finite, as half precision makes them when a network overflows it.
        """
        level = self.sampling.level if level is None else level
        if not blocks.values.isfinite().all():
            message = f"the SDF came out with values that are not finite on {blocks.values.device}; try float32"
            raise GenerationError(message)
        options = DECODED_OPTIONS | {"min_component": min_component, "level": level, "keep_largest": keep_largest}
        meshes = []
        for coords, values in blocks.samples():
            if not (values < level).any():
                raise empty_result("surface", len(meshes), blocks.batch_size)
            meshes.append(blocks_to_mesh(coords, values, blocks.resolution, **options))
        return meshes


def load_pipeline(
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    offload: bool | None = None,
    memory_budget: int | None = None,
) -> Pipeline:
    """Load the model of a folder; default: the shipped `tiny`.

    Args:
        folder: a model folder, see checkpoint.py.
        device: where all networks run.
        dtype: of all networks; default: float32 on the CPU, float16 elsewhere.
        offload: keep the networks in the computer's memory and bring each to the device for its stage alone. Default:
            do so for a model of two stages.
        memory_budget: bytes that decoding may take beside weights.

    Raises:
        ModelFolderError: the folder is missing, damaged, or its networks do not fit together.
    """
    folder, device = folder or TINY, torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if offload is None:
        offload = device.type != "cpu" and "fine_latent_dit" in network_names(folder)
    networks, sampling = load_model(folder, "cpu" if offload else device, dtype)
    place = {"device": device} if offload else {}
    return Pipeline(**networks, sampling=sampling, memory_budget=memory_budget, **place)
