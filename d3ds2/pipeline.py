"""One image -> one mesh: the whole path, a method for each stage.

    pipeline = load_pipeline("d3ds2/weights/tiny")
    mesh = pipeline.generate(load_image("chair.png"), seed=0)

Each stage runs on the device and in the dtype of its own network, and moves what it is given there; noise is drawn on
the CPU, for each sample from its own seed.

Sizes named in this file:
    B  images      L  image tokens, all images packed      N  latent voxels, all samples packed
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .checkpoint import CheckpointError, SamplingConfig, load_model
from .foreground import cut_out, preprocess
from .image_encoder import ImageEncoder, ImageTokens
from .latent_dit import LatentDiT
from .rectified_flow import OnStep, euler_sample, guided_velocity, noise_for, time_schedule
from .sdf_to_mesh import DECODED, Mesh, sdf_to_mesh
from .sdf_vae import FACTOR, SDFVAE
from .structure_dit import StructureDiT
from .structure_vae import StructureVAE
from .voxels import Voxels

TINY = Path(__file__).parent / "weights" / "tiny"  # the shipped model
STAGES = ("image", "structure", "latents", "sdf", "mesh")
LATENT_STREAM = 0x5EED_0F_1A7E57  # so that the two noises of one seed have nothing in common

OnProgress = Callable[[str, int, int], None]  # stage, finished steps, all steps


class GenerationError(ValueError):
    """The networks ran, and made nothing that can become a mesh. The message is one line."""


class EmptyResultError(GenerationError):
    """A stage left nothing of some sample: no occupied voxel, or no surface."""


@dataclass
class Pipeline:
    """The five networks of a model and how they are sampled.

    Raises:
        CheckpointError: sizes that do not fit together.
    """

    image_encoder: ImageEncoder
    structure_vae: StructureVAE
    structure_dit: StructureDiT
    latent_dit: LatentDiT
    sdf_vae: SDFVAE
    sampling: SamplingConfig

    def __post_init__(self):
        encoder, structure = self.image_encoder.config, self.structure_dit.config
        latent_resolution = structure.resolution * self.structure_vae.config.factor
        for what, expected, got in (
            ("context_size of structure_dit", encoder.hidden_size, structure.context_size),
            ("context_size of latent_dit", encoder.hidden_size, self.latent_dit.config.context_size),
            ("latent_channels of structure_dit", self.structure_vae.config.latent_channels, structure.latent_channels),
            (
                "latent_channels of latent_dit",
                self.sdf_vae.config.latent_channels,
                self.latent_dit.config.latent_channels,
            ),
            ("sdf_resolution", FACTOR * latent_resolution, self.sampling.sdf_resolution),
        ):
            if expected != got:
                raise CheckpointError(f"the networks do not fit together: expected {what} {expected}, got {got}")

    def generate(
        self,
        image: Image.Image,
        seed: int = 0,
        on_progress: OnProgress | None = None,
        structure_steps: int | None = None,
        latent_steps: int | None = None,
    ) -> Mesh:
        """One mesh of one image; see `generate_batch`."""
        return self.generate_batch([image], [seed], on_progress, structure_steps, latent_steps)[0]

    def generate_batch(
        self,
        images: Sequence[Image.Image],
        seeds: Sequence[int],
        on_progress: OnProgress | None = None,
        structure_steps: int | None = None,
        latent_steps: int | None = None,
    ) -> list[Mesh]:
        """A mesh of each image, all stages in turn.

        Args:
            images: RGB on a plain background, or RGBA as `cut_out` gives them.
            seeds: one for each image; it alone decides the noise of its sample.
            on_progress: called at the beginning of every stage, with 0 finished steps, and after every step of it.
            structure_steps, latent_steps: default: the model's.

        Returns:
            Meshes in [-1, 1]³, Y up, the object's front toward +Z.

        Raises:
            ImageError: no foreground in an image.
            GenerationError: nothing was made of an image.
        """
        report = on_progress or (lambda stage, step, steps: None)
        structure_steps = structure_steps or self.sampling.structure_steps
        latent_steps = latent_steps or self.sampling.latent_steps

        report("image", 0, 1)
        image_tokens = self.encode_image(images)
        report("image", 1, 1)

        report("structure", 0, structure_steps)
        voxels = self.sample_structure(
            image_tokens,
            seeds,
            structure_steps,
            on_step=lambda step, x_t, x_0: report("structure", step + 1, structure_steps),
        )

        report("latents", 0, latent_steps)
        latents = self.sample_latents(
            voxels,
            image_tokens,
            seeds,
            latent_steps,
            on_step=lambda step, x_t, x_0: report("latents", step + 1, latent_steps),
        )

        report("sdf", 0, 1)
        sdf, fine_voxels = self.decode_sdf(latents, voxels)
        report("sdf", 1, 1)

        report("mesh", 0, 1)
        meshes = self.to_mesh(sdf, fine_voxels)
        report("mesh", 1, 1)
        return meshes

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> ImageTokens:
        """Cut out, crop, encode: all tokens of B images. Raises ImageError as `cut_out`."""
        size = self.image_encoder.config.image_size
        pixels = torch.stack([preprocess(cut_out(image), size) for image in images])  # (B, 4, S, S)
        weight = next(self.image_encoder.parameters())
        return self.image_encoder(pixels.to(weight.device, weight.dtype))

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
        device = next(self.structure_dit.parameters()).device
        guidance_scale = self.sampling.structure_guidance if guidance_scale is None else guidance_scale
        velocity = guided_velocity(self.structure_dit, image_tokens.to(device), guidance_scale)
        noise = noise_for(list(seeds), [(1, E, R, R, R)] * image_tokens.batch_size).to(device)
        times = time_schedule(steps or self.sampling.structure_steps, self.sampling.structure_shift)
        voxels = self.decode_structure(euler_sample(velocity, noise, times, on_step))
        if 0 in voxels.counts:
            raise _empty("structure", voxels.counts.index(0), voxels.batch_size)
        return voxels

    @torch.no_grad()
    def decode_structure(self, latents: Tensor) -> Voxels:
        """What the structure DiT makes, (B, E, R, R, R) -> the voxels that it occupies, maybe none."""
        latents = latents.to(next(self.structure_vae.parameters()).device)
        return self.structure_vae.occupied(self.structure_vae.decode(self.structure_vae.denormalize_latents(latents)))

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
        device = next(self.latent_dit.parameters()).device
        context = image_tokens.select_foreground() if self.latent_dit.config.sparse_context else image_tokens  # eq. 9
        guidance_scale = self.sampling.latent_guidance if guidance_scale is None else guidance_scale
        velocity = guided_velocity(self.latent_dit, context.to(device), guidance_scale, voxels.to(device))
        E = self.latent_dit.config.latent_channels
        noise = noise_for([seed ^ LATENT_STREAM for seed in seeds], [(count, E) for count in voxels.counts]).to(device)
        times = time_schedule(steps or self.sampling.latent_steps, self.sampling.latent_shift)
        return self.sdf_vae.denormalize_latents(euler_sample(velocity, noise, times, on_step))

    @torch.no_grad()
    def encode_sdf(self, sdf: Tensor, voxels: Voxels) -> tuple[Tensor, Voxels]:
        """Distances (M, 1) on active voxels -> latents (N, E) as `decode_sdf` takes them, and their voxels."""
        device = next(self.sdf_vae.parameters()).device
        mean, _, latent_voxels = self.sdf_vae.encode(sdf.to(device), voxels.to(device))
        return mean, latent_voxels

    @torch.no_grad()
    def decode_sdf(self, latents: Tensor, voxels: Voxels) -> tuple[Tensor, Voxels]:
        """Latents (N, E) of the structure's voxels -> sdf (512 N, 1) in [-1, 1] on the voxels at 8 × the resolution."""
        device = next(self.sdf_vae.parameters()).device
        return self.sdf_vae.decode(latents.to(device), voxels.to(device))

    def to_mesh(
        self,
        sdf: Tensor,
        voxels: Voxels,
        min_component: float = DECODED["min_component"],
        level: float = 0.0,
        keep_largest: bool = False,
    ) -> list[Mesh]:
        """The surface sdf = level of each sample.

        Args:
            sdf, voxels: as `decode_sdf` gives them.
            min_component, level, keep_largest: see `sdf_to_mesh`.

        Raises:
            EmptyResultError: a sample has no surface.
            GenerationError: values that are not finite, as half precision makes them when a network overflows it.
        """
        if not sdf.isfinite().all():
            raise GenerationError(f"the SDF came out with values that are not finite on {sdf.device}; try float32")
        blocks = sdf.view(-1, FACTOR, FACTOR, FACTOR).cpu().split(voxels.block_counts)
        coords = voxels.block_coords[:, 1:].cpu().split(voxels.block_counts)
        meshes = []
        options = DECODED | {"min_component": min_component, "level": level, "keep_largest": keep_largest}
        for block_coords, values in zip(coords, blocks, strict=True):
            if not (values < level).any():
                raise _empty("surface", len(meshes), len(blocks))
            meshes.append(sdf_to_mesh(block_coords.numpy(), values.numpy(), voxels.resolution, **options))
        return meshes


def _empty(what: str, index: int, batch_size: int) -> EmptyResultError:
    which = f" {index + 1} of {batch_size}" if batch_size > 1 else ""
    return EmptyResultError(f"the {what} of image{which} came out empty; try another seed or image")


def load_pipeline(
    folder: str | Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Pipeline:
    """Load the model of a folder; default: the shipped `tiny`.

    Args:
        folder: a model folder, see checkpoint.py.
        device: of all networks.
        dtype: of all networks; default: float32 on the CPU, float16 elsewhere.

    Raises:
        CheckpointError: the folder is missing, damaged, or its networks do not fit together.
    """
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    networks, sampling = load_model(folder or TINY, device, dtype)
    return Pipeline(**networks, sampling=sampling)
