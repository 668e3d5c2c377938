"""Score a trained model on the shapes of a split, which should be one that it has not seen.

    python -m training.evaluate training/configs/tiny_evaluate.toml model_dir=models/mine sampling.latent_guidance=3

1. Round trip of a split through the SDF VAE: mesh -> SDF -> latents -> SDF -> mesh.
2. Generation from one view of each shape of the split, one sample per view. Baselines in the same table: the training
   shape with the most similar picture, and the mean training shape.

`weights` adds scores by other people's networks (docs/evaluation.md); those whose weights are missing are left out.

Writes out_dir/evaluation.json (summaries and all scores), evaluation.md (tables) and generation.png (contact sheet).
Reads the files of prepare_shapes and render_views. Networks run on the device in batches; one process per core makes
meshes, scores and pictures.
"""

import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from d3ds2.kernels.devices import find_device, find_dtype
from d3ds2.networks.model_files import load_network
from d3ds2.pipeline import load_pipeline
from d3ds2.storage.atomic_file import replacing
from d3ds2.storage.dataclass_values import from_dict
from d3ds2.storage.model_folder import SamplingConfig, load_settings
from training.command import run_command
from training.data.index_files import read_index
from training.data.meshes import list_meshes
from training.data.name_lists import read_names
from training.data.shape_files import list_shapes
from training.evaluation import generation, generation_scores, round_trip
from training.evaluation.generation import GenerationConfig
from training.evaluation.learned_scores import FID, LearnedScores, WeightsConfig, learned_table
from training.evaluation.shape_scores import ScoreConfig
from training.mesh_jobs import end_with_parent

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluateConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    meshes: str = ""  # folder that prepare_shapes read: adds scores against the originals, and by mesh defects
    out_dir: str = "runs/evaluation"
    split: str = "test"
    names: str = ""  # file with the names of the shapes to score, one on each line; "": all of the split
    limit: int = 0  # only the first shapes of these; 0: all
    seed: int = 0
    parts: tuple[Literal["round_trip", "generation"], ...] = ("round_trip", "generation")
    device: str = "auto"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of the networks; auto: fp16 on CUDA, else fp32
    workers: int = 0  # processes for meshes and scores; 0: one per core
    max_tokens: int = 32768  # in a batch of the VAE
    num_points: int = 20_000  # sampled on each surface
    cells: int = 128  # per edge of the grid for the volume IoU
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)  # of networks that score, see docs/evaluation.md
    sampling: dict[str, int | float] = field(default_factory=dict)  # override the model's own settings

    def __post_init__(self):
        for name in ("num_points", "cells", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")


def main(config: EvaluateConfig) -> dict:
    """Evaluate the model; return the content of evaluation.json."""
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    name, sampling = load_settings(config.model_dir)
    sampling = from_dict(SamplingConfig, dataclasses.asdict(sampling) | config.sampling, "sampling.")
    R = sampling.sdf_resolution
    names, tokens = chosen_shapes(config, R)
    source_of = {record["name"]: record["source"] for record in read_index(config.data_dir)}
    sources = {name: source_of[name] for name in names}
    scoring = ScoreConfig(config.data_dir, R, config.num_points, config.cells, config.seed, sampling.level)
    result = {"model": name, "config": dataclasses.asdict(config), "sampling": dataclasses.asdict(sampling)}
    text = f"# Evaluation of {name}\n\nSplit {config.split}, {len(names)} shapes, SDF at {R}³, seed {config.seed}.\n\n"

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the pool: each core has its own shape
    workers = config.workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        if "round_trip" in config.parts:
            result["round_trip"], table = evaluate_round_trip(config, sources, tokens, scoring, pool)
            text += table + "\n"
        if "generation" in config.parts:
            result["generation"], table = evaluate_generation(config, sampling, sources, scoring, pool)
            text += table + "\n"
    with replacing(out_dir / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    (out_dir / "evaluation.md").write_text(text)
    print(text)
    return result


def chosen_shapes(config: EvaluateConfig, resolution: int) -> tuple[list[str], np.ndarray]:
    """List the names of the shapes to score, and their tokens (n,).

    Raises:
        ValueError: no shape of the split has one of the names.
        OSError: the list of names cannot be read.
    """
    names, tokens = list_shapes(config.data_dir, config.split, resolution)
    if config.names:
        wanted = read_names(config.names)
        rows = [row for row, name in enumerate(names) if name in wanted]
        if not rows:
            raise ValueError(
                f"expected shapes of split {config.split} with names of {config.names}, got none in {config.data_dir}"
            )
        names, tokens = [names[row] for row in rows], tokens[rows]
    return names[: config.limit or None], tokens[: config.limit or None]


def evaluate_round_trip(
    config: EvaluateConfig, sources: dict[str, str], tokens: np.ndarray, scoring: ScoreConfig, pool: Executor
) -> tuple[dict, str]:
    """Return summaries and scores for evaluation.json, and the table; tokens (n,) are those of the n sources."""
    device = find_device(config.device)
    vae = load_network(config.model_dir, "sdf_vae", device, dtype_of(config, device))
    entries = {entry.name: entry for entry in list_meshes(config.meshes)} if config.meshes else {}
    batches = round_trip.batches_of(list(sources), tokens, config.max_tokens)
    only_normals = dataclasses.replace(WeightsConfig(), inception=config.weights.inception)
    learned = LearnedScores.load(only_normals, device, dtype_of(config, device))
    scores = round_trip.round_trips(vae, batches, entries, pool, scoring, learned)
    summaries, table = round_trip.report(round_trip.groups_of(scores, sources, entries), scoring.resolution)
    if learned.networks:
        distance = learned.fid()
        return {"summaries": summaries, "normal_fid": distance, "scores": scores}, f"{table}\n{FID}: {distance:.2f}.\n"
    return {"summaries": summaries, "scores": scores}, f"{table}\n{learned.missing(('inception',))}"


def evaluate_generation(
    config: EvaluateConfig, sampling: SamplingConfig, sources: dict[str, str], scoring: ScoreConfig, pool: Executor
) -> tuple[dict, str]:
    """Return summaries and scores for evaluation.json, and the tables; write the contact sheet."""
    device = find_device(config.device)
    pipeline = load_pipeline(config.model_dir, device, dtype_of(config, device), sampling=sampling)
    learned = LearnedScores.load(config.weights, device, dtype_of(config, device))
    items, baselines = generation.run(pipeline, sources, config.generation, config.seed, scoring, pool, learned)
    sheet = generation_scores.sheet_of(items)
    if sheet is not None:
        sheet.quantize(256).save(Path(config.out_dir) / "generation.png", optimize=True)
    summaries, tables = generation_scores.report(
        items,
        sampling,
        config.generation.train_split,
        baselines,
        scoring,
        config.split,
        config.generation.true_structure,
    )
    about, table = learned_table(learned, [item.learned for item in items])
    scores = [item.record for item in items]
    return {"summaries": summaries, "learned": about, "baselines": baselines, "scores": scores}, f"{tables}\n{table}"


def dtype_of(config: EvaluateConfig, device: torch.device) -> torch.dtype:
    """The dtype of the networks' weights."""
    if config.precision == "auto":
        return find_dtype("auto", device)
    return DTYPES[config.precision]


if __name__ == "__main__":
    run_command(main, EvaluateConfig)
