"""Samples of a model for single views of a split, and the answers of the baselines, for `training.evaluate`."""

import dataclasses
import hashlib
import json
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.images.render import Camera
from d3ds2.networks.image_encoder import ImageEncoder, ImageTokens
from d3ds2.pipeline import EmptyResultError, Pipeline
from training.data.loading import load_batches
from training.data.shape_batches import join_coords
from training.data.shape_files import list_shapes, load_shape, shape_path
from training.data.symmetry import facing
from training.data.views import Pictures, Views, choose_views
from training.evaluation.generation_scores import Item, score_item
from training.evaluation.learned_scores import LearnedScores
from training.evaluation.mean_solid import mean_solid, mesh_of_mean, packed_solid
from training.evaluation.nearest_view import NearestView
from training.evaluation.round_trip import split_blocks
from training.evaluation.shape_scores import ScoreConfig

DESCRIBED_AT_ONCE = 64  # training pictures
NOTHING = np.zeros((0, 3), dtype=np.int32), np.zeros((0, 8, 8, 8), dtype=np.float16)


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of the part `generation`."""

    train_split: str = "train"  # whose shapes the baselines know
    batch_size: int = 16  # images sampled at once
    views_per_shape: int = 1
    turn_to_camera: bool = True  # as in training, see symmetry.py
    true_structure: bool = False  # sample latents for the true blocks: shows how much the structure stage loses
    baselines: bool = True  # false: score the model alone, e.g. to tune its guidance
    baseline_views: int = 8  # pictures compared of each training shape
    mean_shape: bool = True  # among the baselines; for thousands of shapes it takes minutes to make
    sheet: int = 24  # samples on the contact sheet, drawn by the seed, not picked
    workers: int = 0  # processes that read pictures

    def __post_init__(self):
        for name in ("batch_size", "views_per_shape", "baseline_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected generation.{name} >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Baselines:
    """Answers that need no generation."""

    nearest: NearestView
    names: list[str]  # of the training shapes
    mean_mesh: tuple[np.ndarray, np.ndarray] | None
    about: dict[str, float]  # for the report


def seed_of(seed: int, name: str, file: str) -> int:
    """The seed of a sample. It depends on the view alone, so `limit` and the batch size do not change samples."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{file}".encode()).digest()[:4], "big") >> 1


def sample(
    pipeline: Pipeline,
    image_tokens: ImageTokens,
    seeds: list[int],
    mirrored: ImageTokens | None = None,
    structures: list[np.ndarray] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sample one shape for each image: block_coords (M,3) and SDF values (M,8,8,8) fp16; M = 0 if it came out empty.

    `mirrored` holds the tokens of the mirrored images, for a model that reads them. `structures`, the block coordinates
    (M,3) of each sample, take the place of sampled ones.
    """
    try:
        if structures is None:
            voxels = pipeline.sample_structure(image_tokens, seeds, mirrored=mirrored)
        else:
            voxels = Voxels.sort(join_coords(structures), pipeline.sampling.sdf_resolution // BLOCK, len(seeds))[0]
        blocks = pipeline.decode_blocks(pipeline.sample_latents(voxels, image_tokens, seeds), voxels)
        return split_blocks(*pipeline.finish(blocks).to_voxels())
    except EmptyResultError:
        if len(seeds) == 1:
            return [NOTHING]
        return [
            sample(
                pipeline,
                image_tokens.sample(i),
                [seed],
                mirrored and mirrored.sample(i),
                structures and structures[i : i + 1],
            )[0]
            for i, seed in enumerate(seeds)
        ]


def true_blocks(item: Item, scoring: ScoreConfig) -> np.ndarray:
    """Read the block coordinates (M,3) of an item's shape, turned to the camera."""
    return load_shape(shape_path(scoring.data_dir, scoring.resolution, item.name), item.symmetry).block_coords


def make_baselines(
    encoder: ImageEncoder, config: GenerationConfig, seed: int, scoring: ScoreConfig, pool: Executor
) -> Baselines:
    """Prepare the baselines from all shapes of the training split."""
    names, _ = list_shapes(scoring.data_dir, config.train_split, scoring.resolution)
    views = Views(scoring.data_dir, names, encoder.config.image_size, config.turn_to_camera, augment=False)
    chosen = choose_views(views, config.baseline_views, seed)
    pictures = Pictures(views, chosen, DESCRIBED_AT_ONCE)
    device = next(encoder.parameters()).device
    nearest = NearestView(encoder, chosen, load_batches(pictures, 0, len(pictures), config.workers, device))
    about: dict[str, float] = {"shapes": len(views.names), "pictures": len(nearest.chosen)}
    if not config.mean_shape:
        return Baselines(nearest, views.names, None, about)
    solids = [pool.submit(packed_solid, scoring.data_dir, scoring.resolution, name) for name in views.names]
    symmetries = [views.symmetries_of(shape) for shape in range(len(views.names))]
    mean = mean_solid((solid.result(), s) for solid, s in zip(solids, symmetries, strict=True))
    about |= {"level": mean.level, "iou_on_train": mean.iou}
    return Baselines(nearest, views.names, mesh_of_mean(mean.mean, mean.level), about)


def camera_of(file: Path) -> Camera:
    """Read the camera of a view from cameras.json beside it.

    Raises:
        ValueError: cameras.json does not list the file.
    """
    for view in json.loads((file.parent / "cameras.json").read_text())["views"]:
        if view["file"] == file.name:
            return Camera(**view["camera"])
    raise ValueError(f"expected {file.name} in {file.parent / 'cameras.json'}")


def run(
    pipeline: Pipeline,
    sources: dict[str, str],
    config: GenerationConfig,
    seed: int,
    scoring: ScoreConfig,
    pool: Executor,
    learned: LearnedScores,
) -> tuple[list[Item], dict[str, float] | None]:
    """Sample and score one or more views of each shape. The pool computes scores while the next batch is sampled.

    Args:
        sources: the source of each shape to evaluate, by name.
        learned: scores by networks, which look at each result.

    Returns:
        The items, and facts about the baselines for the report; None without baselines.
    """
    encoder = pipeline.image_encoder
    weight = next(encoder.parameters())
    baselines = make_baselines(encoder, config, seed, scoring, pool) if config.baselines else None
    views = Views(scoring.data_dir, list(sources), encoder.config.image_size, config.turn_to_camera, augment=False)
    chosen = choose_views(views, config.views_per_shape, seed)
    drawn = set(np.random.default_rng(seed).permutation(len(chosen))[: config.sheet].tolist())
    pictures = Pictures(views, chosen, config.batch_size)
    jobs, inputs = [], []
    batches = load_batches(pictures, 0, len(pictures), config.workers, weight.device)
    for images in tqdm(batches, total=len(pictures), desc="generation", unit="batch"):
        items = []
        for view in chosen[len(jobs) : len(jobs) + len(images)]:
            file, name = views.files[view.shape][view.view], views.names[view.shape]
            camera = camera_of(file)
            if config.turn_to_camera:
                camera = dataclasses.replace(camera, azimuth=facing(camera.azimuth)[1])
            items.append(Item(name, sources[name], file.name, camera, view.symmetry, seed_of(seed, name, file.name)))
        similar = baselines.nearest.find(encoder, images) if baselines else {}
        pixels = images.to(weight.dtype) / 255
        mirrored = encoder(pixels.flip(-1)) if pipeline.sampling.reads_mirrored() else None
        structures = [true_blocks(item, scoring) for item in items] if config.true_structure else None
        made = sample(pipeline, encoder(pixels), [item.seed for item in items], mirrored, structures)
        for place, (item, (block_coords, values)) in enumerate(zip(items, made, strict=True)):
            if baselines:
                for kind, found in similar.items():
                    item.nearest[kind] = (baselines.names[found[place].shape], found[place].symmetry)
            if len(jobs) in drawn:
                item.pictures.append(images[place, :3].permute(1, 2, 0).cpu().numpy())
            mean_mesh = baselines.mean_mesh if baselines else None
            look = bool(learned.networks)
            jobs.append(pool.submit(score_item, item, block_coords, values, mean_mesh, scoring, look))
            inputs.append(images[place, :3].permute(1, 2, 0).cpu().numpy() if look else None)
    scored = []
    for picture in tqdm(inputs, desc="scores", unit="mesh"):
        item = jobs.pop(0).result()
        item.learned, item.appearances = learned.add(picture, item.appearances), {}
        scored.append(item)
    return scored, baselines.about if baselines else None
