"""Train the sparse SDF VAE (SS-VAE), eq. 2-3.

    python -m training.train_vae training/configs/tiny_vae.toml run.steps=5000 data_dir=data/mine

Each step draws a resolution and a packed batch of shapes. A stopped run resumes from the newest checkpoint in
`run.out_dir`. With every checkpoint, the EMA weights are exported to `model_dir`.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import dataclasses
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from d3ds2.kernels.devices import make_generator
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from training.config import load_config
from training.data.datasets import Shapes, load_batches
from training.data.shape_batches import ShapeBatch, active_voxels
from training.losses import SDFLossConfig, sdf_loss
from training.run import Log, RunConfig, Stop, autocast, is_save_step, seed_step, start
from training.state import State, load_start


@dataclass(frozen=True)
class TrainVAEConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    split: str = "train"
    resolutions: tuple[int, ...] = (256,)  # one is drawn each step; the paper: 256, 384, 512, then 1024 [A]
    batch_size: int = 4  # shapes; the paper: 4 per GPU, 8 GPUs [A]
    max_tokens: int = 32768  # in a batch; larger shapes are left out
    symmetries: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)  # of the shapes, see symmetry.py [D]
    gradient_checkpointing: bool = False
    freeze_encoder: bool = False  # train the decoder alone: networks that learn its latents stay valid
    run: RunConfig = field(default_factory=lambda: RunConfig(out_dir="runs/vae"))
    model: SDFVAEConfig = field(default_factory=SDFVAEConfig)
    loss: SDFLossConfig = field(default_factory=SDFLossConfig)

    def __post_init__(self):
        if self.freeze_encoder and not self.run.start_from:
            raise ValueError("freeze_encoder needs run.start_from, the model folder whose encoder is kept")


def vae_loss(model: SDFVAE, batch: ShapeBatch, loss: SDFLossConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Compute eq. 2-3 on a batch: "loss" and its terms, each a scalar."""
    sdf, voxels = active_voxels(batch)
    decoded, _, mean, logvar = model(sdf, voxels, generator)  # (512 M, 1), in the order of the blocks
    return sdf_loss(decoded, batch.sdf, batch.sharp, mean, logvar, loss)


def keep_encoder(model: SDFVAE, folder: str) -> None:
    """Freeze the encoder, and take over the scale of its latents from the folder's config."""
    model.encoder.requires_grad_(False)
    known = load_network(folder, "sdf_vae").config
    model.config = dataclasses.replace(
        model.config, latents_scale=known.latents_scale, latents_shift=known.latents_shift
    )


def train(config: TrainVAEConfig) -> nn.Module:
    """Run the training; return the averaged (EMA) model."""
    run = config.run
    device = start(run, config)
    model = SDFVAE(config.model).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    load_start(run, sdf_vae=model)
    if config.freeze_encoder:
        keep_encoder(model, run.start_from)
    state = State(model, run)
    state.load()
    generator = make_generator(device)
    shapes = Shapes(
        config.data_dir,
        config.split,
        config.resolutions,
        config.batch_size,
        config.max_tokens,
        run.seed,
        config.symmetries,
    )

    with Stop(run.max_minutes) as stop, Log(run, state.step) as log:
        for batch in load_batches(shapes, state.step, run.steps, run.workers, device):
            seed_step(generator, run.seed, state.step)
            with autocast(run, device):
                terms = vae_loss(model, batch, config.loss, generator)
            terms["loss"].backward()
            grad_norm = state.update()

            log(state.step, {**terms, "grad_norm": grad_norm, "tokens": len(batch.block_coords)})
            if is_save_step(state.step, stop, run):
                state.save()
                save_network(config.model_dir, "sdf_vae", state.ema, torch.float16)
                if stop:
                    break
    return state.ema


if __name__ == "__main__":
    train(load_config(TrainVAEConfig, sys.argv[1:]))
