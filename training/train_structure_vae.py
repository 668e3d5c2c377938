"""Train the structure VAE: occupancy of the latent grid <-> a small dense latent volume.

    python -m training.train_structure_vae training/configs/tiny_structure_vae.toml data_dir=data/mine

A stopped run resumes from the newest checkpoint in `run.out_dir`. With every checkpoint, the scale of the latents is
measured, and the EMA weights are exported to `model_dir`.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch import nn

from d3ds2.kernels.devices import make_generator
from d3ds2.networks.model_files import save_network
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from training.config import load_config
from training.data.datasets import Structures, load_batches
from training.data.latent_moments import LatentMoments, set_latent_scale
from training.data.shape_files import list_shapes
from training.losses import StructureLossConfig, structure_loss
from training.run import Log, RunConfig, Stop, autocast, is_save_step, seed_step, start
from training.state import State, load_start

MEASURED_BATCHES = 16  # for the scale of the latents


@dataclass(frozen=True)
class TrainStructureVAEConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    split: str = "train"
    resolution: int = 512  # of the SDF; the structure's edge is an eighth [B]
    batch_size: int = 16  # shapes
    symmetries: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)  # of the shapes, see symmetry.py [D]
    gradient_checkpointing: bool = False
    run: RunConfig = field(default_factory=lambda: RunConfig(out_dir="runs/structure_vae"))
    model: StructureVAEConfig = field(default_factory=StructureVAEConfig)
    loss: StructureLossConfig = field(default_factory=StructureLossConfig)


@torch.no_grad()
def measure_latents(vae: StructureVAE, structures: Structures, device: torch.device) -> LatentMoments:
    """Measure the latents of the first batches."""
    moments = LatentMoments(vae.config.latent_channels, device)
    for step in range(MEASURED_BATCHES):
        mean, logvar = vae.encode(structures[step].to(device))
        moments.add(mean.movedim(1, -1).flatten(0, -2), logvar.movedim(1, -1).flatten(0, -2))
    return moments


def train(config: TrainStructureVAEConfig) -> nn.Module:
    """Run the training; return the averaged (EMA) model."""
    run = config.run
    device = start(run, config)
    model = StructureVAE(config.model).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    load_start(run, structure_vae=model)
    state = State(model, run)
    state.load()
    generator = make_generator(device)
    names, _ = list_shapes(config.data_dir, config.split, config.resolution)
    structures = Structures(config.data_dir, names, config.resolution, config.batch_size, run.seed, config.symmetries)

    with Stop(run.max_minutes) as stop, Log(run, state.step) as log:
        for occupancy in load_batches(structures, state.step, run.steps, run.workers, device):
            seed_step(generator, run.seed, state.step)
            with autocast(run, device):
                logits, mean, logvar = model(occupancy, generator)
                terms = structure_loss(logits, occupancy, mean, logvar, config.loss)
            terms["loss"].backward()
            grad_norm = state.update()

            log(state.step, {**terms, "grad_norm": grad_norm})
            if is_save_step(state.step, stop, run):
                state.save()
                set_latent_scale(state.ema, measure_latents(state.ema, structures, device))
                save_network(config.model_dir, "structure_vae", state.ema, torch.float16)
                if stop:
                    break
    return state.ema


if __name__ == "__main__":
    train(load_config(TrainStructureVAEConfig, sys.argv[1:]))
