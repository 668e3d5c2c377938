"""Train the sparse SDF VAE (SS-VAE), eq. 2-3.

    python -m training.train_vae training/configs/tiny_vae.toml run.steps=5000 data_dir=data/mine

Each step draws a resolution and a packed batch of shapes. A stopped run resumes from the newest checkpoint in
`run.out_dir`. With every checkpoint, the EMA weights are exported to `model_dir`.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d3ds2.geometry.voxels import BLOCK
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from training.data.datasets import Shapes
from training.data.parts import WHOLE, Part, load_parts
from training.data.shape_batches import ShapeBatch, active_voxels
from training.distributed import Ranks, run_script
from training.loop import run_steps
from training.losses import SDF_TERMS, SDFLossConfig, count_sdf, draw_noise, sdf_loss
from training.run import RunConfig, autocast, start
from training.run_folder import exporting
from training.sample_pictures import SDF_LABELS, reconstructions
from training.state import State, load_start
from training.validation import Validation, batches_of


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
    crop: int = 0  # latents per edge of the cube of a shape that is upsampled, see crops.py; 0: all [B/C]
    crop_margin: int = 4  # latents around it, which do not count in the loss [B/C]
    fine: bool = False  # the second stage's VAE, `fine_sdf_vae`
    start_network: str = ""  # of run.start_from; "": that of the same name
    run: RunConfig = field(default_factory=lambda: RunConfig(out_dir="runs/vae"))
    model: SDFVAEConfig = field(default_factory=SDFVAEConfig)
    loss: SDFLossConfig = field(default_factory=SDFLossConfig)

    def __post_init__(self):
        if self.freeze_encoder and not self.run.start_from:
            raise ValueError("freeze_encoder needs run.start_from, the model folder whose encoder is kept")
        if self.crop < 0 or self.crop_margin < 0:
            raise ValueError(f"expected crop and crop_margin of at least 0, got {self.crop} and {self.crop_margin}")

    @property
    def network(self) -> str:
        """The network's name in the model folder."""
        return "fine_sdf_vae" if self.fine else "sdf_vae"

    @property
    def start(self) -> str:
        """The name of the network of `run.start_from`."""
        return self.start_network or self.network

    @property
    def cube(self) -> tuple[int, int] | None:
        """The edge of the cube of a shape that is upsampled, and its margin; None: the whole shape."""
        return (self.crop, self.crop_margin) if self.crop else None


def vae_loss(
    model: SDFVAE, batch: ShapeBatch, loss: SDFLossConfig, generator: torch.Generator, part: Part = WHOLE
) -> dict[str, Tensor]:
    """Compute eq. 2-3 on a batch: "loss" and its terms, each a scalar."""
    sdf, voxels = active_voxels(batch)
    mean, logvar, latent_voxels = model.encode(sdf, voxels)  # (M, C)
    noise = draw_noise(mean, generator, part.draw_tokens)
    latents, crop = mean + (0.5 * logvar).exp() * noise, batch.crop
    upsampled = None if crop is None else (crop.rows, crop.voxels)
    decoded, _ = model.decode(latents, latent_voxels, part=upsampled)  # (512 P, 1), in the blocks' order
    if crop is not None:
        decoded = decoded.unflatten(0, (-1, BLOCK**3))[crop.decoded].flatten(0, 1)
    return sdf_loss(decoded, *targets_of(batch), mean, logvar, loss, part.shares)


def targets_of(batch: ShapeBatch) -> tuple[Tensor, Tensor]:
    """The true SDF of the blocks that count, and which of their voxels are near sharp edges: (K, 8, 8, 8) each."""
    if batch.crop is None:
        return batch.sdf, batch.sharp
    return batch.sdf[batch.crop.blocks], batch.sharp[batch.crop.blocks]


def count_terms(batch: ShapeBatch) -> Tensor:
    """Count over what each of SDF_TERMS is a mean in a batch, (5,)."""
    return count_sdf(*targets_of(batch), len(batch.block_coords))


def keep_encoder(model: SDFVAE, folder: str, name: str) -> None:
    """Freeze the encoder, and take over the scale of its latents from the folder's config."""
    model.encoder.requires_grad_(False)
    known = load_network(folder, name).config
    model.config = dataclasses.replace(
        model.config, latents_scale=known.latents_scale, latents_shift=known.latents_shift
    )


def make_validation(config: TrainVAEConfig, ranks: Ranks, averaged: Callable[[], nn.Module]) -> Validation:
    """Validate on eq. 2-3, and show reconstructions."""
    run = config.run

    def load() -> tuple[Shapes, int]:
        data = config.data_dir, run.validate_split, config.resolutions
        shapes = Shapes(*data, config.batch_size, config.max_tokens, run.seed, crop=config.cube)
        number = sum(batches_of(len(names), config.batch_size) for names in shapes.names.values())
        return shapes, number

    return Validation(
        run,
        ranks,
        averaged,
        load,
        lambda vae, batch, generator: vae_loss(vae, batch, config.loss, generator),
        reconstructions,
        SDF_LABELS,
    )


def train(config: TrainVAEConfig) -> nn.Module:
    """Run the training; return the averaged (EMA) model."""
    with start(config.run, config) as ranks:
        return train_on(ranks, config)


def train_on(ranks: Ranks, config: TrainVAEConfig) -> nn.Module:
    """Run the training on each of the ranks."""
    run, device = config.run, ranks.device
    model = SDFVAE(config.model).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    load_start(run, **{config.start: model})
    if config.freeze_encoder:
        keep_encoder(model, run.start_from, config.start)
    state = State(model, run, ranks)
    state.load()
    shapes = Shapes(
        config.data_dir,
        config.split,
        config.resolutions,
        config.batch_size,
        config.max_tokens,
        run.seed,
        config.symmetries,
        config.cube,
    )

    def losses(part: Part, generator: torch.Generator) -> dict[str, Any]:
        with autocast(run, device):
            terms = vae_loss(model, part.batch, config.loss, generator, part)
        return {**terms, "tokens": part.own(len(part.batch.block_coords))}

    def export(averaged: nn.Module) -> None:
        with exporting(config.model_dir):
            save_network(config.model_dir, config.network, averaged, torch.float16)

    batches = load_parts(shapes, state.step, run, ranks, SDF_TERMS, count_terms)
    return run_steps(state, batches, losses, make_validation(config, ranks, state.averaged), export)


if __name__ == "__main__":
    run_script(train, TrainVAEConfig, sys.argv[1:])
