"""One image, or several views of one object -> one mesh: the whole path, a method for each step of it.

    pipeline = load_pipeline("d3ds2/weights/tiny")
    mesh = pipeline.generate(load_image("chair.png"), seed=0)
    mesh = pipeline.generate([load_image("chair.png"), load_image("chair_from_the_left.png")], seed=0)

Each network runs on its own device and in its own dtype; a method moves what it is given there. Noise is drawn on the
CPU, for each sample from its own seed. A model of two stages voxelises the mesh of the first and samples latents for
those voxels. `sample_latents` and the decoding find the stage by the resolution of the voxels.

Sizes named in this file:
    B  images      E  latent channels      R  latent voxels per edge      N  occupied latent voxels, all samples packed
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .blocks_to_meshes import blocks_to_meshes
from .generation_error import EmptyResultError, GenerationError, empty_result
from .geometry.sdf_blocks import SDFBlocks
from .geometry.voxels import Voxels
from .images.foreground import cut_out, preprocess
from .kernels.devices import find_dtype, shares_memory
from .meshes.mesh import Mesh
from .meshes.sdf_to_mesh import DECODED_OPTIONS
from .networks.chunked_decode import OnChunk, decode_in_chunks
from .networks.image_encoder import ImageEncoder, ImageTokens
from .networks.model_files import load_model
from .networks.refined_blocks import OnPatch, refine_surface
from .networks.sdf_vae import FACTOR
from .networks.structure_dit import StructureDiT
from .networks.structure_vae import StructureVAE
from .offload import on_device
from .rectified_flow import EULER, OnStep, Sampler, euler_sample, mean_velocity, noise_for
from .stage import FINE_STAGES, STAGES, Stage, stages_of
from .storage.model_folder import ModelFolderError, SamplingConfig, network_names

TINY = Path(__file__).parent / "weights" / "tiny"  # the shipped model
GUIDED_BATCH_TOKENS = 32768  # tokens of a sample up to which both guidance branches run as one batch

__all__ = [
    "FINE_STAGES", "STAGES", "TINY", "EmptyResultError", "GenerationError", "Pipeline", "Stage", "build_pipeline",
    "load_pipeline",
]  # fmt: skip

OnProgress = Callable[[str, int, int], None]  # stage, finished steps, all steps
Views = Image.Image | Sequence[Image.Image]  # one picture of an object, or several
TokensOfViews = ImageTokens | Sequence[ImageTokens]  # of B images; or of the first views of B objects, the second, ...


@dataclass
class Pipeline:
    """The networks of a model and how they are sampled.

    Args:
        stages: one or two, the coarse one first.
        sampling: of the structure; also the level of the surface and the rounding of times. The steps, shift and
            guidance of latents are those of their `Stage`.
        device: where each network is brought while it runs. Default: they stay where they are.
        memory_budget: bytes that decoding may take beside weights. Default: see `decode_in_chunks`.

    Raises ModelFolderError for sizes that do not fit together.
    """

    image_encoder: ImageEncoder
    structure_vae: StructureVAE
    structure_dit: StructureDiT
    stages: tuple[Stage, ...]
    sampling: SamplingConfig
    device: torch.device | str | None = None
    memory_budget: int | None = None

    def __post_init__(self):
        hidden_size, structure = self.image_encoder.config.hidden_size, self.structure_dit.config
        sdf_resolution = FACTOR * self.structure_vae.config.factor * structure.resolution
        sizes = [
            ("context_size of structure_dit", hidden_size, structure.context_size),
            ("latent_channels of structure_dit", self.structure_vae.config.latent_channels, structure.latent_channels),
            ("sdf_resolution", sdf_resolution, self.stages[0].sdf_resolution),
        ]
        sizes += [size for stage in self.stages for size in stage.sizes(hidden_size)]
        for name, expected, got in sizes:
            if expected != got:
                raise ModelFolderError(f"the networks do not fit together: expected {name} {expected}, got {got}")

    def generate(
        self,
        image: Views,
        seed: int = 0,
        on_progress: OnProgress | None = None,
        structure_steps: int | None = None,
        latent_steps: int | None = None,
        **options,
    ) -> Mesh:
        """One mesh of one image, or of several views of an object; see `generate_batch`, also for `options`."""
        return self.generate_batch([image], [seed], on_progress, structure_steps, latent_steps, **options)[0]

    def generate_batch(
        self,
        images: Sequence[Views],
        seeds: Sequence[int],
        on_progress: OnProgress | None = None,
        structure_steps: int | None = None,
        latent_steps: int | None = None,
        fine_steps: int | None = None,
        fine: bool = True,
        use_refiners: bool = False,
        sampler: Sampler = EULER,
    ) -> list[Mesh]:
        """A mesh of each image, all stages in turn.

        Args:
            images: RGB on a plain background, or RGBA as `cut_out` gives them; or several such views of each object,
                equally many of all. The samplers take the mean of the velocities for all views.
            seeds: one for each image; it alone decides the noise of its sample.
            on_progress: called at the beginning of every stage, with 0 finished steps, and after every step of it.
            structure_steps, latent_steps, fine_steps: default: the model's.
            fine: go through the second stage, where the model has one.
            use_refiners: the model's refiners tell what is inside, instead of all that the outside does not reach.
            sampler: of all stages.

        Returns:
            Meshes in [-1, 1]³, Y up, the object's front toward +Z.

        Raises:
            ImageError: no foreground in an image.
            ValueError: the objects have different numbers of views.
            GenerationError: nothing was made of an image.
            ModelFolderError: the model has no refiners.
        """
        report = on_progress or (lambda stage, step, steps: None)

        def on_step(stage: str, steps: int) -> OnStep:
            report(stage, 0, steps)
            return lambda step, x_t, x_0: report(stage, step + 1, steps)

        structure_steps = sampler.steps(structure_steps or self.sampling.structure_steps)
        stages = self.stages if fine else self.stages[:1]
        if use_refiners and any(stage.refiner is None for stage in stages):
            raise ModelFolderError("the model has no refiners for this")

        report("image", 0, 1)
        image_tokens, mirrored = self.encode_sides(images, structure_steps)
        report("image", 1, 1)

        meshes: list[Mesh] = []  # of the stage before
        for stage, steps in zip(stages, (latent_steps, fine_steps), strict=False):
            structure_name, latents_name, sdf_name, mesh_name = stage.progress
            if not meshes:
                how = {"on_step": on_step(structure_name, structure_steps), "sampler": sampler, "mirrored": mirrored}
                voxels = self.sample_structure(image_tokens, seeds, structure_steps, **how)
            else:
                report(structure_name, 0, 1)
                voxels = self.structure_of(meshes)
                report(structure_name, 1, 1)

            on_latents = on_step(latents_name, sampler.steps(steps or stage.steps))
            latents = self.sample_latents(voxels, image_tokens, seeds, steps, on_step=on_latents, sampler=sampler)
            report(sdf_name, 0, 1)
            blocks, level = self.decode_surface(latents, voxels, use_refiners)
            report(sdf_name, 1, 1)
            report(mesh_name, 0, 1)
            meshes = self.blocks_to_meshes(blocks, level=level)
            report(mesh_name, 1, 1)
        return meshes

    def crop_views(self, objects: Sequence[Views]) -> list[Tensor]:
        """Cut out and crop the pictures of B objects: their first views (B, 4, S, S), their second views, and so on.

        Raises ImageError as `cut_out`, and ValueError for objects with different numbers of views, or with none.
        """
        views = [[pictures] if isinstance(pictures, Image.Image) else list(pictures) for pictures in objects]
        counts = [len(pictures) for pictures in views]
        if not all(counts) or len({*counts}) != 1:
            raise ValueError(f"expected equally many views of all objects, got {counts}")
        size = self.image_encoder.config.image_size
        return [torch.stack([preprocess(cut_out(image), size) for image in each]) for each in zip(*views, strict=True)]

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> ImageTokens:
        """Encode pixels (B, 4, S, S) as `crop_views` gives them: all tokens of B images."""
        with on_device(self.image_encoder, self.device) as device:
            return self.image_encoder(pixels.to(device, next(self.image_encoder.parameters()).dtype))

    def encode_image(self, images: Sequence[Image.Image]) -> ImageTokens:
        """Cut out, crop, encode: all tokens of B images. Raises ImageError as `cut_out`."""
        return self.encode_views(images)[0]

    def encode_views(self, objects: Sequence[Views]) -> list[ImageTokens]:
        """Encode the pictures of B objects, view by view. Raises as `crop_views`."""
        return [self.encode_pixels(pixels) for pixels in self.crop_views(objects)]

    def encode_sides(self, objects: Sequence[Views], steps: int) -> tuple[list[ImageTokens], list[ImageTokens] | None]:
        """Encode as `encode_views`, and the mirrored pictures too if a structure of so many steps reads them."""
        views, mirrored = self.crop_views(objects), self.sampling.reads_mirrored(steps)
        tokens = [self.encode_pixels(pixels) for pixels in views]
        return tokens, [self.encode_pixels(pixels.flip(-1)) for pixels in views] if mirrored else None

    @torch.no_grad()
    def sample_structure(
        self,
        image_tokens: TokensOfViews,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
        sampler: Sampler = EULER,
        mirrored: TokensOfViews | None = None,
    ) -> Voxels:
        """Which latent voxels are occupied.

        Args:
            image_tokens: all tokens of B images; or those of several views, as `encode_views` returns them.
            seeds: one for each.
            steps, guidance_scale: default: the model's.
            on_step: called after every step, see `euler_sample`; may raise to stop.
            sampler: how the flow is integrated.
            mirrored: the tokens of the mirrored pictures; read if there is one step, see `SamplingConfig`.

        Returns:
            The occupied voxels of B samples, at an eighth of the SDF's resolution; EmptyResultError if one has none.
        """
        R, E = self.structure_dit.config.resolution, self.structure_dit.config.latent_channels
        guidance_scale = self.sampling.structure_guidance if guidance_scale is None else guidance_scale
        times = sampler.schedule(steps or self.sampling.structure_steps, self.sampling.structure_shift)
        options = {"half_times": self.sampling.half_times, "sampler": sampler}
        sides = [image_tokens] if mirrored is None or len(times) > 2 else [image_tokens, mirrored]
        sides = [[side] if isinstance(side, ImageTokens) else side for side in sides]
        noise = noise_for(list(seeds), [(1, E, R, R, R)] * sides[0][0].batch_size)
        latents = []
        with on_device(self.structure_dit, self.device) as device:
            for views, report in zip(sides, (on_step, None), strict=False):
                velocity = mean_velocity(self.structure_dit, [v.to(device) for v in views], guidance_scale, **options)
                latents.append(euler_sample(velocity, noise.to(device), times, report, sampler.method))
        logits, how = self.structure_logits(latents[0]), self.sampling
        if len(latents) == 2:
            logits = (logits + self.structure_logits(latents[1]).flip(2)) / 2  # x
        voxels = self.structure_vae.occupied(logits, how.structure_threshold, how.structure_widening)
        if 0 in voxels.counts:
            raise empty_result("structure", voxels.counts.index(0), voxels.batch_size)
        return voxels

    @torch.no_grad()
    def structure_logits(self, latents: Tensor) -> Tensor:
        """Decode latents (B, E, R, R, R) to the logits of being occupied (B, 1, S, S, S), S latent voxels per edge."""
        vae = self.structure_vae
        with on_device(vae, self.device) as device:
            return vae.decode(vae.denormalize_latents(latents.to(device)))

    def decode_structure(self, latents: Tensor, widen: int = 0) -> Voxels:
        """Decode latents (B, E, R, R, R) to the occupied voxels, maybe none; `widen`: see `StructureVAE.occupied`."""
        return self.structure_vae.occupied(self.structure_logits(latents), self.sampling.structure_threshold, widen)

    @torch.no_grad()
    def sample_latents(
        self,
        voxels: Voxels,
        image_tokens: TokensOfViews,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
        sampler: Sampler = EULER,
    ) -> Tensor:
        """The latents (N, E) of the structure's voxels, for `decode_blocks`. Arguments as `sample_structure`."""
        stage = self.stage_of(voxels)
        dit, E = stage.latent_dit, stage.latent_dit.config.latent_channels
        views = [image_tokens] if isinstance(image_tokens, ImageTokens) else image_tokens
        if dit.config.sparse_context:
            views = [view.select_foreground() for view in views]  # eq. 9
        guidance_scale = stage.guidance_scale if guidance_scale is None else guidance_scale
        noise = noise_for([seed ^ stage.noise_stream for seed in seeds], [(count, E) for count in voxels.counts])
        times = sampler.schedule(steps or stage.steps, stage.shift)
        options = {"half_times": self.sampling.half_times, "sampler": sampler}
        with on_device(dit, self.device) as device:
            options |= {"voxels": voxels.to(device), "together": max(voxels.counts) <= GUIDED_BATCH_TOKENS}
            velocity = mean_velocity(dit, [v.to(device) for v in views], guidance_scale, **options)
            latents = euler_sample(velocity, noise.to(device), times, on_step, sampler.method)
            return stage.sdf_vae.denormalize_latents(latents)

    def stage_of(self, voxels: Voxels) -> Stage:
        """The stage of latent voxels, by their resolution; the first one for any other resolution."""
        return next((stage for stage in self.stages if stage.resolution == voxels.resolution), self.stages[0])

    def structure_of(self, meshes: Sequence[Mesh]) -> Voxels:
        """The structure of the second stage, from the meshes of the first: see `Stage.voxelize`."""
        if len(self.stages) == 1:
            raise ModelFolderError("the model has no second stage")
        return self.stages[-1].voxelize(meshes)

    @torch.no_grad()
    def decode_blocks(
        self,
        latents: Tensor,
        voxels: Voxels,
        memory_budget: int | None = None,
        on_chunk: OnChunk | None = None,
        features_out: Tensor | None = None,
    ) -> SDFBlocks:
        """Decode what `Stage.without_surplus` keeps; features_out (512 N, channels): see `decode_in_chunks`."""
        stage = self.stage_of(voxels)
        budget, vae = self.memory_budget if memory_budget is None else memory_budget, stage.sdf_vae
        with on_device(vae, self.device) as device:
            latents, voxels = stage.without_surplus(latents.to(device), voxels.to(device))
            return decode_in_chunks(vae, latents, voxels, budget, on_chunk=on_chunk, features_out=features_out)

    def decode_surface(
        self, latents: Tensor, voxels: Voxels, use_refiners: bool = False, on_patch: OnPatch | None = None
    ) -> tuple[SDFBlocks, float]:
        """Decode latents (N, E), refine if asked; return the blocks that make the mesh and the level of their surface.

        Raises ModelFolderError if the model has no refiner of this stage.
        """
        stage, level, features = self.stage_of(voxels), self.sampling.level, None
        if not use_refiners:
            return self.decode_blocks(latents, voxels), level
        if stage.refiner is None:
            raise ModelFolderError("the model has no refiner of this stage")
        latents, voxels = stage.without_surplus(latents, voxels.to(latents.device))
        if stage.refines_with_features:
            weight = next(stage.sdf_vae.parameters())
            shape = FACTOR**3 * len(voxels), stage.refiner.config.feature_channels
            features = torch.empty(shape, dtype=weight.dtype, device=self.device or weight.device)
            level = 2 * level  # as the released pipeline
        decoded = self.decode_blocks(latents, voxels, features_out=features)
        with on_device(stage.refiner, self.device) as device:
            return refine_surface(stage.refiner, decoded, features, level, device, on_patch), level

    def blocks_to_meshes(
        self,
        blocks: SDFBlocks,
        min_component: float = DECODED_OPTIONS["min_component"],
        level: float | None = None,
        keep_largest: bool = False,
    ) -> list[Mesh]:
        """The surface of each sample at a level of the SDF, after `finish`.

        Args:
            min_component, keep_largest: see `sdf_to_mesh`.
            level: default: the model's.

        Raises EmptyResultError if a sample has no surface, and GenerationError if the level is out of range or values
        are not finite: a network overflowed half precision.
        """
        level = self.sampling.level if level is None else level
        return blocks_to_meshes(self.finish(blocks), min_component, level, keep_largest)

    def finish(self, blocks: SDFBlocks) -> SDFBlocks:
        """Smooth and fill decoded blocks as the model asks."""
        return blocks.smoothed(self.sampling.surface_smoothing).filled(self.sampling.least_inside, self.sampling.level)


def build_pipeline(
    networks: Mapping[str, nn.Module],
    sampling: SamplingConfig,
    device: torch.device | str | None = None,
    memory_budget: int | None = None,
) -> Pipeline:
    """The pipeline of networks by their names in a model folder; `device` and `memory_budget` as in `Pipeline`.

    Raises ModelFolderError if the networks do not fit together, or the second stage is there in part.
    """
    shared = {name: networks[name] for name in ("image_encoder", "structure_vae", "structure_dit")}
    return Pipeline(
        **shared, stages=stages_of(networks, sampling), sampling=sampling, device=device, memory_budget=memory_budget
    )


def load_pipeline(
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    offload: bool | None = None,
    memory_budget: int | None = None,
    sampling: SamplingConfig | None = None,
) -> Pipeline:
    """Load the model of a folder; default: the shipped `tiny`.

    Args:
        folder: a model folder, see storage/model_folder.py.
        device: where all networks run.
        dtype: of all networks; default: float32 on the CPU, float16 elsewhere.
        offload: keep the networks in the computer's memory and bring each to the device while it runs. Default: do so
            for a model of two stages.
        memory_budget: bytes that decoding may take beside weights.
        sampling: default: as the folder's config.json says.

    Raises ModelFolderError if the folder is missing, damaged, or its networks do not fit together.
    """
    folder, device = folder or TINY, torch.device(device)
    dtype = find_dtype("auto", device) if dtype is None else dtype
    if offload is None:
        offload = not shares_memory(device) and "fine_latent_dit" in network_names(folder)
    networks, own_sampling = load_model(folder, "cpu" if offload else device, dtype)
    return build_pipeline(networks, sampling or own_sampling, device if offload else None, memory_budget)
