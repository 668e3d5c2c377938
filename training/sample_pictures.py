"""Pictures of what a network in training makes of a few shapes, beside the truth: for `training.validation`.

Each function returns a row of pictures for each shape, under its own `..._LABELS`.

Sizes: B samples, M blocks = tokens of all of them, C latent channels, g latents and G voxels per edge of a structure.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3ds2.geometry.sdf_blocks import SDFBlocks
from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.images.voxel_picture import voxel_picture
from d3ds2.kernels.devices import on_cuda
from d3ds2.meshes.sdf_to_mesh import DECODED_OPTIONS
from d3ds2.meshes.sdf_to_mesh_gpu import device_mesh, tensors_to_mesh
from d3ds2.networks.chunked_decode import decode_in_chunks
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.networks.structure_dit import StructureDiT
from d3ds2.networks.structure_vae import StructureVAE
from d3ds2.rectified_flow import euler_sample, guided_velocity, noise_for, time_schedule
from d3ds2.storage.model_folder import ModelFolderError, SamplingConfig, load_settings
from training.data.latent_views import LatentBatch
from training.data.shape_batches import ShapeBatch, active_voxels

SIZE = 192  # pixels per edge
SIDES = (-35.0, 145.0)  # azimuths of the two pictures of a mesh
SDF_LABELS = ("truth", "truth, other side", "result", "result, other side")
STRUCTURE_LABELS = ("truth", "result")
SAMPLE_LABELS = ("input", *SDF_LABELS)
STRUCTURE_SAMPLE_LABELS = ("input", *STRUCTURE_LABELS)
Row = list[Any]  # pictures, each as `contact_sheet` takes them


def reconstructions(vae: SDFVAE, batch: ShapeBatch, number: int) -> list[Row]:
    """Show the first shapes of a batch before and after the VAE."""
    mean, _, voxels = vae.encode(*active_voxels(batch))
    coords, number = first_samples(batch.block_coords, number, batch.batch_size)
    truth = SDFBlocks(coords, batch.sdf[: len(coords)].float(), batch.resolution, number)
    latent_voxels = Voxels(coords, voxels.resolution, number)
    decoded = decode_in_chunks(vae, mean[: len(coords)].float(), latent_voxels)
    return [a + b for a, b in zip(surfaces(truth), surfaces(decoded, decoded=True), strict=True)]


def structure_reconstructions(vae: StructureVAE, occupancy: Tensor, number: int) -> list[Row]:
    """Show the first of (B, 1, G, G, G) uint8 before and after the VAE."""
    mean, _ = vae.encode(occupancy[:number])
    return [a + b for a, b in zip(grids(occupancy[:number]), structures(vae, mean), strict=True)]


def structure_samples(
    dit: StructureDiT,
    vae: StructureVAE,
    image_tokens: ImageTokens,
    images: Tensor,
    occupancy: Tensor,
    sampling: SamplingConfig,
) -> list[Row]:
    """Sample a structure for each of B pictures (B, 4, S, S) in [0, 1], beside its true one (B, 1, G, G, G) uint8."""
    B, R, E = len(images), dit.config.resolution, dit.config.latent_channels
    velocity = guided_velocity(
        dit, image_tokens, sampling.structure_guidance, together=False, half_times=sampling.half_times
    )
    noise = noise_for(list(range(B)), [(1, E, R, R, R)] * B).to(images.device)
    latents = euler_sample(velocity, noise, time_schedule(sampling.structure_steps, sampling.structure_shift))
    made = structures(vae, vae.denormalize_latents(latents))
    return [[a, *b, *c] for a, b, c in zip(inputs(images), grids(occupancy), made, strict=True)]


def latent_samples(
    dit: LatentDiT,
    vae: SDFVAE,
    image_tokens: ImageTokens,
    batch: LatentBatch,
    number: int,
    resolution: int,
    sampling: SamplingConfig,
) -> list[Row]:
    """Sample latents on the true structures of the first shapes; the truth is what the VAE makes of the true latents.

    `image_tokens` are those of these shapes' pictures alone.
    """
    coords, number = first_samples(batch.coords, number, len(batch.images))
    voxels, E = Voxels(coords, resolution // BLOCK, number), dit.config.latent_channels
    velocity = guided_velocity(
        dit, image_tokens, sampling.latent_guidance, voxels, together=False, half_times=sampling.half_times
    )
    noise = noise_for(list(range(number)), [(count, E) for count in voxels.counts]).to(coords.device)
    latents = euler_sample(velocity, noise, time_schedule(sampling.latent_steps, sampling.latent_shift))
    made = decode_in_chunks(vae, vae.denormalize_latents(latents), voxels)
    truth = decode_in_chunks(vae, batch.mean[: len(coords)].float(), voxels)
    rows = inputs(batch.images[:number].float() / 255), surfaces(truth, True), surfaces(made, True)
    return [[a, *b, *c] for a, b, c in zip(*rows, strict=True)]


def sampling_of(model_dir: str | Path) -> SamplingConfig:
    """The settings by which a model folder is sampled; the defaults where it has none yet."""
    try:
        return load_settings(model_dir)[1]
    except ModelFolderError:
        return SamplingConfig()


def first_samples(coords: Tensor, number: int, batch_size: int) -> tuple[Tensor, int]:
    """Return the rows of the first samples of coords (M, 4), which are sorted by sample, and how many samples."""
    number = min(number, batch_size)
    return coords[: int((coords[:, 0] < number).sum())], number


# --- pictures of one kind


def inputs(images: Tensor) -> Row:
    """The colours of pictures (B, 4, S, S) in [0, 1]: B of (S, S, 3) uint8."""
    return list((images[:, :3] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def surfaces(blocks: SDFBlocks, decoded: bool = False) -> list[Row]:
    """Render the surface of each sample from two sides. One that has none gives empty places."""
    options = DECODED_OPTIONS if decoded else {}
    make_mesh = device_mesh if on_cuda(blocks.values) else tensors_to_mesh
    rows: list[Row] = []
    for coords, values in blocks.samples():
        if not (values.isfinite().all() and (values < 0).any()):
            rows.append([None] * len(SIDES))
            continue
        mesh = make_mesh(coords, values, blocks.resolution, **options)
        renderer = MeshRenderer(mesh.vertices, mesh.faces)
        lights = [Light(azimuth=azimuth + Light.azimuth, shadows=True) for azimuth in SIDES]
        rows.append(
            [renderer.render(Camera(azimuth=a), SIZE, light, 2) for a, light in zip(SIDES, lights, strict=True)]
        )
    return rows


def structures(vae: StructureVAE, latents: Tensor) -> list[Row]:
    """Draw the voxels that the VAE decodes from latents (B, C, g, g, g), not normalised."""
    return grids(vae.decode(latents).sigmoid() >= vae.config.threshold)


def grids(occupied: Tensor) -> list[Row]:
    """Draw the voxels of grids (B, 1, G, G, G)."""
    coords = [torch.nonzero(grid[0]).cpu().numpy().astype(np.int64) for grid in occupied]
    return [[voxel_picture(c, occupied.shape[-1], SIZE)] for c in coords]
