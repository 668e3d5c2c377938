"""Train the latent DiT (SS-DiT with spatial sparse attention) by rectified flow (eq. 10-11).

    python -m training.train_dit training/configs/tiny_dit.toml data_dir=data/mine

Needs the pictures of render_views, the latents of encode_latents, and the image encoder in `model_dir`; for
`predicted_structures`, also the structure DiT and VAE there. None of these change. With a table `[rendered]`, new
pictures are rendered of the surfels of sample_surfels, as in train_structure_dit. A stopped run resumes from the newest
checkpoint in `run.out_dir`. With every checkpoint, the EMA weights are exported to `model_dir`.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.networks.image_encoder import ImageEncoder, ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.rectified_flow import interpolate
from d3ds2.storage.model_folder import SamplingConfig, load_settings, save_settings
from training.data.datasets import MEMORY_GIB
from training.data.device_pictures import LatentChoices
from training.data.imperfect_pictures import make_imperfect as make_imperfect_pictures
from training.data.imperfect_structures import (
    Draw,
    drawer,
    on_structures,
    predicted_structures,
    random_structures,
    rows_of,
)
from training.data.latent_moments import check_latents
from training.data.latent_views import ChosenLatents, LatentBatch, LatentViews
from training.data.parts import WHOLE, Part, load_parts
from training.data.rendered_pictures import (
    RenderedPictures,
    RenderedPicturesConfig,
    SidesOfShapes,
    check_rendered,
    load_views,
)
from training.data.shape_files import list_shapes
from training.data.views import Views
from training.decoded_surface import DecodedSurface
from training.distributed import Ranks, run_script
from training.loop import run_steps
from training.lora import LoRAConfig, add_adapters, merged
from training.losses import (
    FlowLossConfig,
    SurfaceLossConfig,
    draw_noise,
    keep_context,
    training_times,
    velocity_loss,
)
from training.run import RunConfig, autocast, start
from training.run_folder import exporting
from training.sample_pictures import SAMPLE_LABELS, latent_samples, sampling_of
from training.speed import token_weights
from training.state import State, load_start
from training.validation import Validation, batches_of


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
    cache_latents: bool = True  # keep all latents in memory up to the size of memory_gib
    memory_gib: float = MEMORY_GIB  # of each process
    imperfect_pictures: bool = False  # change pictures as those of train_structure_dit [D]
    imperfect_structures: bool = False  # add and remove blocks, see imperfect_structures.py [D]
    predicted_structures: float = 0.0  # share of samples on the structure that `model_dir` predicts of the picture [D]
    predicted_thresholds: tuple[float, float] = (0.03, 0.4)  # of the probability from which their voxels are occupied
    predicted_wide: float = 0.5  # share of these that get a layer of voxels more
    gradient_checkpointing: bool = False  # compute blocks again in the backward pass, to hold less memory
    recompute_all: bool = False  # then attention and feed-forward too: 13 kB less a token and block, but slower
    run: RunConfig = field(default_factory=lambda: RunConfig(out_dir="runs/dit"))
    model: LatentDiTConfig = field(default_factory=LatentDiTConfig)
    loss: FlowLossConfig = field(default_factory=FlowLossConfig)
    surface: SurfaceLossConfig | None = None  # also of what the prediction of x_0 decodes to [D]
    rendered: RenderedPicturesConfig | None = None  # render new pictures of surfels in every step [D]
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # train adapters on the network of run.start_from
    sampling: SamplingConfig | None = None  # steps and guidance for the config.json of the exported model
    fine: bool = False  # the second stage: `fine_latent_dit`, on the latents of `fine_sdf_vae`
    start_network: str = ""  # of run.start_from; "": that of the same name
    export_dir: str = ""  # where the network is written; "": to model_dir

    def __post_init__(self):
        self._check_surplus()
        for key in ("predicted_structures", "predicted_wide"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"expected {key} in [0, 1], got {getattr(self, key)}")
        low, high = self.predicted_thresholds
        if not 0 < low <= high < 1:
            raise ValueError(f"expected predicted_thresholds as [low, high] between 0 and 1, got {[low, high]}")
        check_rendered(self.rendered, self.turn_to_camera)
        if self.sampling is None:
            return
        own = self.sampling.fine if self.fine else self.sampling
        key = "sampling.fine.sdf_resolution" if self.fine else "sampling.sdf_resolution"
        if own is None or own.sdf_resolution != self.resolution:
            raise ValueError(
                f"expected {key} {self.resolution} as trained, got {own.sdf_resolution if own else 'no sampling.fine'}"
            )

    def _check_surplus(self) -> None:
        """Check that the network can learn what to say of surplus blocks. Raises ValueError if not."""
        value, decoded = self.model.surplus_value, self.surface is not None and self.surface.surplus
        if not self.imperfect_structures and not self.predicted_structures:
            return
        if bool(value) == decoded:
            raise ValueError(
                "expected model.surplus_value above 0 or surface.surplus for structures with surplus blocks, and not "
                f"both, got {value:g} and {decoded}"
            )
        if decoded and self.loss.noise_alone < 1:
            raise ValueError(
                "expected loss.noise_alone 1 with surface.surplus, since surplus blocks have no latents, "
                f"got {self.loss.noise_alone:g}"
            )

    @property
    def prefix(self) -> str:
        """The prefix of this stage's networks in a model folder."""
        return "fine_" if self.fine else ""


def draw_latents(
    vae: SDFVAE,
    batch: LatentBatch | ChosenLatents,
    sample_posterior: bool,
    generator: torch.Generator,
    part: Part = WHOLE,
) -> Tensor:
    """Draw the normalised x_0 of a batch from the posteriors, or take their means: (M, C) float32."""
    latents = batch.mean.float()
    if sample_posterior:
        noise = draw_noise(latents, generator, part.draw_tokens)
        latents = latents + (0.5 * batch.logvar.float()).exp() * noise
    return vae.normalize_latents(latents)


@torch.no_grad()
def encode_images(encoder: ImageEncoder, images: Tensor, sparse_context: bool) -> ImageTokens:
    """Encode pictures (B, 4, S, S) in [0, 1]; `sparse_context` keeps only the tokens of the object (eq. 9)."""
    image_tokens = encoder(images)
    return image_tokens.select_foreground() if sparse_context else image_tokens


class ChangedStructures(NamedTuple):
    """Other structures for the latents of a batch, see `imperfect_structures`."""

    surplus_value: float
    imperfect: bool  # random ones
    share: float  # of the samples that get a predicted one
    predict: Callable[[Draw], Tensor] | None  # returns (B, G, G, G) bool

    def change(
        self, x_0: Tensor, voxels: Voxels, occupied: Tensor, draw: Draw
    ) -> tuple[Tensor, Voxels, Tensor, Tensor]:
        """Make other structures of true ones, (B, G, G, G) bool.

        Returns:
            Their tokens' latents (M, C), the structures, the noise (M, C), and which tokens have a surface, (M,) bool.
        """
        chosen = random_structures(occupied, draw) if self.imperfect else occupied
        if self.predict is not None:
            is_predicted = draw(torch.rand)[:, None, None, None] < self.share
            chosen = torch.where(is_predicted, self.predict(draw), chosen)
        other, rows = on_structures(voxels, chosen)
        has_surface = rows >= 0
        x_0 = torch.where(has_surface[:, None], x_0[rows.clamp(min=0)], self.surplus_value)
        noise = draw(torch.randn, *[voxels.resolution] * 3, x_0.shape[1])[tuple(other.coords.long().t())]
        return x_0, other, noise, has_surface


def flow_loss(
    model: LatentDiT,
    image_tokens: ImageTokens,
    x_0: Tensor,
    voxels: Voxels,
    loss: FlowLossConfig,
    generator: torch.Generator,
    part: Part = WHOLE,
    structures: ChangedStructures | None = None,
    surface: DecodedSurface | None = None,
) -> Tensor:
    """Compute eq. 10-11 on packed latents x_0 (M, C); at random, some samples get no image.

    With other `structures`, the loss is the mean over as many tokens as the true ones have. Surplus tokens count if
    there is a `surplus_value` for them. With a `surface`, its loss is added.
    """
    B, M = voxels.batch_size, len(voxels)
    keep = part.draw_samples(B, lambda B: keep_context(B, loss, generator)).to(x_0.device)
    t = part.draw_samples(B, lambda B: training_times(B, loss, generator)).to(x_0.device)
    if structures is None:
        noise = draw_noise(x_0, generator, part.draw_tokens)
        occupied, has_surface = None, torch.ones(M, dtype=torch.bool, device=x_0.device)
    else:
        occupied = rows_of(voxels) >= 0
        draw = drawer(B, generator, part.draw_samples, x_0.device)
        x_0, voxels, noise, has_surface = structures.change(x_0, voxels, occupied, draw)
    x_t = interpolate(x_0, noise, t[voxels.batch_index, None])  # eq. 10
    velocity = model(x_t, t, voxels, image_tokens.where(keep))
    if structures is None or structures.surplus_value:
        mean = velocity_loss(velocity, x_0, noise)  # eq. 11
    else:
        mean = velocity_loss(velocity[has_surface], x_0[has_surface], noise[has_surface]) * has_surface.float().mean()
    if surface is not None:
        decoded = part.draw_samples(B, lambda B: torch.rand(B, generator=generator, device=generator.device))
        predicted = x_t - t[voxels.batch_index, None] * velocity
        decoded = decoded.to(x_0.device) < surface.config.share
        mean = mean + surface.of(predicted, x_0, voxels, has_surface, decoded, occupied)
    return part.weigh("tokens", mean * (len(voxels) / M))


def count_tokens(batch: LatentBatch | ChosenLatents) -> Tensor:
    """Count the tokens of a batch, (1,): the loss is a mean over them."""
    return torch.tensor([len(batch.coords)])


def make_validation(
    config: TrainDiTConfig, ranks: Ranks, averaged: Callable[[], nn.Module], encoder: ImageEncoder, vae: SDFVAE
) -> Validation:
    """Validate on eq. 11 with every image and the means of the latents, and show samples on the true structures.

    A network that learns from noise alone is also validated there.
    """
    run, R = config.run, config.resolution
    alone = float(config.loss.noise_alone == 1)
    flow = dataclasses.replace(config.loss, context_dropout=0.0, noise_alone=alone, sample_posterior=False)

    def load() -> tuple[LatentViews, int]:
        tokens_of = dict(zip(*list_shapes(config.data_dir, run.validate_split, R), strict=True))
        size = encoder.config.image_size
        views = Views(config.data_dir, list(tokens_of), size, config.turn_to_camera, augment=False)
        tokens = np.array([tokens_of[name] for name in views.names])
        data = LatentViews(
            config.data_dir, R, views, tokens, config.batch_size, 1, config.max_tokens, run.seed, cache=False
        )
        return data, batches_of(len(views.names), config.batch_size)

    def loss(dit: LatentDiT, batch: LatentBatch, generator: torch.Generator) -> dict[str, Tensor]:
        voxels = Voxels(batch.coords, R // BLOCK, len(batch.images))
        x_0 = draw_latents(vae, batch, False, generator)
        image_tokens = encode_images(encoder, batch.images.float() / 255, config.model.sparse_context)
        return {"loss": flow_loss(dit, image_tokens, x_0, voxels, flow, generator)}

    def draw(dit: LatentDiT, batch: LatentBatch, number: int) -> list:
        image_tokens = encode_images(encoder, batch.images[:number].float() / 255, config.model.sparse_context)
        return latent_samples(
            dit, vae, image_tokens, batch, number, R, config.sampling or sampling_of(config.model_dir)
        )

    return Validation(run, ranks, averaged, load, loss, draw, SAMPLE_LABELS)


def train(config: TrainDiTConfig) -> nn.Module:
    """Run the training; return the averaged (EMA) model."""
    with start(config.run, config) as ranks:
        return train_on(ranks, config)


def train_on(ranks: Ranks, config: TrainDiTConfig) -> nn.Module:
    """Run the training on each of the ranks."""
    run, device = config.run, ranks.device
    model = LatentDiT(config.model).to(device)
    model.gradient_checkpointing, model.recompute_all = config.gradient_checkpointing, config.recompute_all
    load_start(run, **{config.start_network or f"{config.prefix}latent_dit": model})
    add_adapters(model, config.lora)
    state = State(model, run, ranks)
    state.load()

    encoder = load_network(config.model_dir, "image_encoder", device)
    vae = load_network(config.model_dir, f"{config.prefix}sdf_vae", device).requires_grad_(False)
    check_latents(config.data_dir, config.resolution, vae, config.model_dir)
    tokens_of = dict(zip(*list_shapes(config.data_dir, config.split, config.resolution), strict=True))
    how, rendered = (config.turn_to_camera, config.cache_views, config.rendered), None
    views = load_views(config.data_dir, list(tokens_of), encoder.config.image_size, *how)
    if isinstance(views, SidesOfShapes):
        assert config.rendered is not None
        rendered = RenderedPictures(views, config.rendered, device)
    dataset = (LatentViews if rendered is None else LatentChoices)(
        config.data_dir,
        config.resolution,
        views,
        np.array([tokens_of[name] for name in views.names]),
        config.batch_size,
        config.views_per_shape,
        config.max_tokens,
        run.seed,
        config.cache_latents,
        config.memory_gib,
    )

    first_stage, surface = None, None
    if config.surface is not None:
        surface = DecodedSurface(vae, config.surface)
    if config.predicted_structures:
        first_stage = [load_network(config.model_dir, name, device) for name in ("structure_dit", "structure_vae")]

    def losses(part: Part, generator: torch.Generator) -> dict[str, Any]:
        batch = part.batch
        voxels = Voxels(batch.coords, config.resolution // BLOCK, batch.batch_size)
        x_0 = draw_latents(vae, batch, config.loss.sample_posterior, generator, part)
        with autocast(run, device):
            if rendered is None:
                images = batch.images.float() / 255
            else:
                images = rendered.draw(batch.choice, generator, draw_samples=part.draw_samples).images
            if config.imperfect_pictures:
                images = make_imperfect_pictures(images, generator, part.draw_samples)
            image_tokens, structures = encode_images(encoder, images, False), None
            if config.imperfect_structures or first_stage:
                predict = None
                if first_stage:
                    cut = config.predicted_thresholds, config.predicted_wide
                    predict = partial(predicted_structures, *first_stage, image_tokens, *cut)
                share = config.predicted_structures
                structures = ChangedStructures(config.model.surplus_value, config.imperfect_structures, share, predict)
            if config.model.sparse_context:
                image_tokens = image_tokens.select_foreground()
            loss = flow_loss(model, image_tokens, x_0, voxels, config.loss, generator, part, structures, surface)
        return {"loss": loss, "tokens": part.own(len(voxels))}

    batches = load_parts(dataset, state.step, run, ranks, ("tokens",), count_tokens)
    validate = make_validation(config, ranks, state.averaged, encoder, vae)
    return run_steps(state, batches, losses, validate, partial(export, config), token_weights(model))


def export(config: TrainDiTConfig, ema: nn.Module) -> None:
    """Write the averaged model, and how to sample it, to the model folder."""
    folder = config.export_dir or config.model_dir
    with exporting(folder):
        save_network(folder, f"{config.prefix}latent_dit", merged(ema), torch.float16)
        if config.sampling is not None:
            sampling, known = config.sampling, load_settings(folder)[1]
            if config.fine:
                sampling = dataclasses.replace(known, fine=sampling.fine)
            elif known.fine and not sampling.fine:
                sampling = dataclasses.replace(sampling, fine=known.fine)
            save_settings(folder, Path(folder).name, sampling)


if __name__ == "__main__":
    run_script(train, TrainDiTConfig, sys.argv[1:])
