"""Train the structure VAE: occupancy of the latent grid <-> a small dense latent volume.

    python -m training.train_structure_vae training/configs/tiny_structure_vae.toml data_dir=data/mine

A stopped run resumes from the newest checkpoint in `run.out_dir`. With every checkpoint, the scale of the latents is
measured, and the EMA weights are exported to `model_dir`.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d3ds2.networks.model_files import save_network
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from training.data.datasets import MEMORY_GIB, Structures
from training.data.latent_moments import LatentMoments, set_latent_scale
from training.data.parts import WHOLE, Part, load_parts
from training.data.shape_files import list_shapes
from training.distributed import Ranks, run_script
from training.loop import run_steps
from training.losses import StructureLossConfig, draw_noise, structure_loss
from training.run import RunConfig, autocast, start
from training.run_folder import exporting
from training.sample_pictures import STRUCTURE_LABELS, structure_reconstructions
from training.state import State, load_start
from training.validation import Validation, batches_of

MEASURED_BATCHES = 16  # for the scale of the latents


@dataclass(frozen=True)
class TrainStructureVAEConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    split: str = "train"
    resolution: int = 512  # of the SDF; the structure's edge is an eighth [B]
    batch_size: int = 16  # shapes
    symmetries: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)  # of the shapes, see symmetry.py [D]
    memory_gib: float = MEMORY_GIB  # keep the blocks of all shapes in memory up to this size
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


def vae_loss(
    model: StructureVAE, occupancy: Tensor, loss: StructureLossConfig, generator: torch.Generator, part: Part = WHOLE
) -> dict[str, Tensor]:
    """Compute the loss of occupancy grids (B, 1, G, G, G): "loss", its terms and "iou", each a scalar."""
    mean, logvar = model.encode(occupancy)  # (B, C, g, g, g)
    noise = draw_noise(mean, generator, part.draw_samples)
    logits = model.decode(mean + (0.5 * logvar).exp() * noise)
    terms = structure_loss(logits, occupancy, mean, logvar, loss)
    return {name: part.weigh("samples", term) for name, term in terms.items()}


def count_samples(occupancy: Tensor) -> Tensor:
    """Count the samples of a batch, (1,): all terms are means over equally large samples."""
    return torch.tensor([len(occupancy)])


def make_validation(config: TrainStructureVAEConfig, ranks: Ranks, averaged: Callable[[], nn.Module]) -> Validation:
    """Validate on the loss of the occupancy, and show reconstructions."""
    run = config.run

    def load() -> tuple[Structures, int]:
        names, _ = list_shapes(config.data_dir, run.validate_split, config.resolution)
        structures = Structures(config.data_dir, names, config.resolution, config.batch_size, run.seed)
        return structures, batches_of(len(structures.names), config.batch_size)

    return Validation(
        run,
        ranks,
        averaged,
        load,
        lambda vae, occupancy, generator: vae_loss(vae, occupancy, config.loss, generator),
        structure_reconstructions,
        STRUCTURE_LABELS,
    )


def train(config: TrainStructureVAEConfig) -> nn.Module:
    """Run the training; return the averaged (EMA) model."""
    with start(config.run, config) as ranks:
        return train_on(ranks, config)


def train_on(ranks: Ranks, config: TrainStructureVAEConfig) -> nn.Module:
    """Run the training on each of the ranks."""
    run, device = config.run, ranks.device
    model = StructureVAE(config.model).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    load_start(run, structure_vae=model)
    state = State(model, run, ranks)
    state.load()
    names, tokens = list_shapes(config.data_dir, config.split, config.resolution)
    structures = Structures(
        config.data_dir,
        names,
        config.resolution,
        config.batch_size,
        run.seed,
        config.symmetries,
        tokens,
        config.memory_gib,
    )

    def losses(part: Part, generator: torch.Generator) -> dict[str, Any]:
        with autocast(run, device):
            terms = vae_loss(model, part.batch, config.loss, generator, part)
        return {**terms, "samples": len(part.batch)}

    def export(averaged: nn.Module) -> None:
        set_latent_scale(averaged, measure_latents(averaged, structures, device))
        with exporting(config.model_dir):
            save_network(config.model_dir, "structure_vae", averaged, torch.float16)

    batches = load_parts(structures, state.step, run, ranks, ("samples",), count_samples)
    return run_steps(state, batches, losses, make_validation(config, ranks, state.averaged), export)


if __name__ == "__main__":
    run_script(train, TrainStructureVAEConfig, sys.argv[1:])
