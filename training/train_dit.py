"""Train the latent DiT (SS-DiT with spatial sparse attention) by rectified flow (eq. 10-11).

    python -m training.train_dit training/configs/tiny_dit.toml data_dir=data/mine

Needs the pictures of render_views, the latents of encode_latents, and the image encoder in `model_dir`, which does not
change. A stopped run resumes from the newest checkpoint in `run.out_dir`. With every checkpoint, the EMA weights are
exported to `model_dir`.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.kernels.devices import make_generator
from d3ds2.networks.image_encoder import ImageEncoder, ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.rectified_flow import interpolate
from d3ds2.storage.model_folder import SamplingConfig, save_settings
from training.config import load_config
from training.data.datasets import LatentBatch, LatentViews, load_batches
from training.data.latent_moments import check_latents
from training.data.shape_files import list_shapes
from training.data.views import Views
from training.losses import FlowLossConfig, draw_noise, keep_context, training_times, velocity_loss
from training.run import Log, RunConfig, Stop, autocast, is_save_step, seed_step, start
from training.state import State, load_start


@dataclass(frozen=True)
class TrainDiTConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    split: str = "train"
    resolution: int = 256  # of the SDF; the paper: 256, 384, 512, 1024, one after the other [A]
    batch_size: int = 8  # pictures; the paper: 8 per GPU, 8 GPUs [A]
    views_per_shape: int = 1  # pictures of the same shape in a batch
    max_tokens: int = 65536  # in a batch; larger shapes are left out
    turn_to_camera: bool = True  # the front is the side that the camera sees, see symmetry.py [D]
    cache_views: bool = False  # keep all decoded pictures in memory
    cache_latents: bool = True  # keep all latents in memory
    gradient_checkpointing: bool = False
    run: RunConfig = field(default_factory=lambda: RunConfig(out_dir="runs/dit"))
    model: LatentDiTConfig = field(default_factory=LatentDiTConfig)
    loss: FlowLossConfig = field(default_factory=FlowLossConfig)
    sampling: SamplingConfig | None = None  # steps and guidance for the config.json of the exported model

    def __post_init__(self):
        if self.sampling is not None and self.sampling.sdf_resolution != self.resolution:
            raise ValueError(
                f"expected sampling.sdf_resolution {self.resolution} as trained, got {self.sampling.sdf_resolution}"
            )


def draw_latents(vae: SDFVAE, batch: LatentBatch, sample_posterior: bool, generator: torch.Generator) -> Tensor:
    """Draw the normalised x_0 of a batch from the posteriors, or take their means: (M, C) float32."""
    latents = batch.mean.float()
    if sample_posterior:
        noise = draw_noise(latents, generator)
        latents = latents + (0.5 * batch.logvar.float()).exp() * noise
    return vae.normalize_latents(latents)


@torch.no_grad()
def encode_images(encoder: ImageEncoder, images: Tensor, sparse_context: bool) -> ImageTokens:
    """Encode pictures (B, 4, S, S) uint8; `sparse_context` keeps only the tokens of the object (eq. 9)."""
    image_tokens = encoder(images.float() / 255)
    return image_tokens.select_foreground() if sparse_context else image_tokens


def flow_loss(
    model: LatentDiT,
    image_tokens: ImageTokens,
    x_0: Tensor,
    voxels: Voxels,
    loss: FlowLossConfig,
    generator: torch.Generator,
) -> Tensor:
    """Compute eq. 10-11 on packed latents x_0 (M, C); at random, some samples get no image."""
    B = voxels.batch_size
    keep = keep_context(B, loss, generator).to(x_0.device)
    t = training_times(B, loss, generator).to(x_0.device)
    noise = draw_noise(x_0, generator)
    x_t = interpolate(x_0, noise, t[voxels.batch_index, None])  # eq. 10
    return velocity_loss(model(x_t, t, voxels, image_tokens.where(keep)), x_0, noise)  # eq. 11


def train(config: TrainDiTConfig) -> nn.Module:
    """Run the training; return the averaged (EMA) model."""
    run = config.run
    device = start(run, config)
    model = LatentDiT(config.model).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    load_start(run, latent_dit=model)
    state = State(model, run)
    state.load()
    generator = make_generator(device)

    encoder = load_network(config.model_dir, "image_encoder", device)
    vae = load_network(config.model_dir, "sdf_vae", device)  # for the scale of its latents
    check_latents(config.data_dir, config.resolution, vae, config.model_dir)
    tokens_of = dict(zip(*list_shapes(config.data_dir, config.split, config.resolution), strict=True))
    views = Views(
        config.data_dir, list(tokens_of), encoder.config.image_size, config.turn_to_camera, cache=config.cache_views
    )
    dataset = LatentViews(
        config.data_dir,
        config.resolution,
        views,
        np.array([tokens_of[name] for name in views.names]),
        config.batch_size,
        config.views_per_shape,
        config.max_tokens,
        run.seed,
        config.cache_latents,
    )

    with Stop(run.max_minutes) as stop, Log(run, state.step) as log:
        for batch in load_batches(dataset, state.step, run.steps, run.workers, device):
            seed_step(generator, run.seed, state.step)
            voxels = Voxels(batch.coords, config.resolution // BLOCK, len(batch.images))
            x_0 = draw_latents(vae, batch, config.loss.sample_posterior, generator)
            with autocast(run, device):
                image_tokens = encode_images(encoder, batch.images, config.model.sparse_context)
                loss = flow_loss(model, image_tokens, x_0, voxels, config.loss, generator)
            loss.backward()
            grad_norm = state.update()

            log(state.step, {"loss": loss, "grad_norm": grad_norm, "tokens": len(voxels)})
            if is_save_step(state.step, stop, run):
                state.save()
                save_network(config.model_dir, "latent_dit", state.ema, torch.float16)
                if config.sampling is not None:
                    save_settings(config.model_dir, Path(config.model_dir).name, config.sampling)
                if stop:
                    break
    return state.ema


if __name__ == "__main__":
    train(load_config(TrainDiTConfig, sys.argv[1:]))
