"""Train the latent DiT in several forms, each from the same seeds for the same steps, and compare them in one table.

    python benchmarks/ablations.py training/configs/ablations.toml data_dir=data/tiny max_minutes=30

The forms are the files of training/configs/ablations. Needs shapes, pictures and latents of the splits `train` and
`val`, made with the VAE of the model in `start_from` (encode_latents with keep_scale=true), and takes the image encoder
from there. Each form is scored on the same pictures of unseen shapes: by the loss at fixed times and noises, and by the
meshes that it makes on the true structure, so that no other network but the VAE counts.

`max_minutes` stops it: the run in training saves its state, and the same command continues. Writes
out_dir/<form>_<seed>/ (run, model, result.json), out_dir/ablations.json and ablations.md.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from d3ds2.geometry.segments import samples_of  # noqa: E402
from d3ds2.geometry.voxels import BLOCK, Voxels  # noqa: E402
from d3ds2.kernels.devices import find_device  # noqa: E402
from d3ds2.kernels.segment_sum import sample_means  # noqa: E402
from d3ds2.networks.image_encoder import ImageTokens  # noqa: E402
from d3ds2.networks.latent_dit import LatentDiT  # noqa: E402
from d3ds2.networks.model_files import load_network, save_network  # noqa: E402
from d3ds2.networks.sdf_vae import SDFVAE  # noqa: E402
from d3ds2.rectified_flow import (  # noqa: E402
    euler_sample,
    guided_velocity,
    interpolate,
    noise_for,
    time_schedule,
    velocity_target,
)
from d3ds2.storage.atomic_file import replacing  # noqa: E402
from training import train_dit  # noqa: E402
from training.command import run_command  # noqa: E402
from training.config import load_config  # noqa: E402
from training.data.loading import load_batches  # noqa: E402
from training.data.shape_batches import join, join_coords  # noqa: E402
from training.data.shape_files import latent_path, list_shapes, read_latents  # noqa: E402
from training.data.views import Pictures, View, Views, choose_views  # noqa: E402
from training.evaluation.generation import seed_of  # noqa: E402
from training.evaluation.round_trip import split_blocks  # noqa: E402
from training.evaluation.score_tables import format_summary, markdown_table, summarize  # noqa: E402
from training.evaluation.shape_scores import F_DISTANCE, ScoreConfig, Shape, compare  # noqa: E402
from training.mesh_jobs import end_with_parent  # noqa: E402
from training.run import autocast, read_metrics  # noqa: E402
from training.run_folder import last_step  # noqa: E402
from training.train_dit import TrainDiTConfig, encode_images  # noqa: E402

SCORES = {  # column: score, factor, digits
    "val loss ↓": ("loss", 1, 4),
    "volume IoU ↑": ("iou", 1, 3),
    "CD ×10³ ↓": ("chamfer", 1e3, 1),
    f"F1 @ {F_DISTANCE} ↑": ("f1", 1, 3),
    "F1 @ 1 voxel ↑": ("f1_voxel", 1, 3),
}


@dataclass(frozen=True)
class AblationsConfig:
    configs: str = "training/configs/ablations"  # folder of the forms; its base.toml is none
    forms: tuple[str, ...] = ()  # names of the files to compare, without .toml; empty: all
    compared_with: str = "ssa"  # the form from which differences are counted
    start_from: str = "d3ds2/weights/tiny"  # model folder of the image encoder and the VAE
    data_dir: str = "data/tiny"
    out_dir: str = "runs/ablations"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 4000
    max_minutes: float = 0.0  # after which to save and stop; 0: no limit
    split: str = "val"  # of the scores
    limit: int = 0  # only the first shapes of the split; 0: all
    times: int = 8  # at which the loss of each picture is taken, spread as the times of training
    sampling_steps: int = 12
    shift: float = 3.0  # of the sampler's times
    guidance: float = 1.0
    level: float = 0.06  # of the surface, that of the VAE
    num_points: int = 20_000  # sampled on each surface
    cells: int = 128  # per edge of the grid for the volume IoU
    batch_size: int = 8  # shapes scored at once
    device: str = "auto"
    workers: int = 0  # processes for meshes and scores; 0: one per core
    overrides: tuple[str, ...] = ()  # of all forms, as key=value

    def __post_init__(self):
        if min(self.steps, self.times, self.sampling_steps, self.batch_size, len(self.seeds)) < 1:
            raise ValueError("expected steps, times, sampling_steps, batch_size and seeds of at least 1")


def main(config: AblationsConfig) -> dict:
    """Train and score all that is missing, or until the time is over; return the content of ablations.json."""
    files = sorted(path.stem for path in Path(config.configs).glob("*.toml") if path.stem != "base")
    forms = config.forms or tuple(files)
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else float("inf")
    results: dict[str, dict[int, dict]] = {form: {} for form in forms}
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the pool: each core has its own shape
    workers = config.workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        for seed in config.seeds:
            for form in forms:
                minutes = (deadline - time.monotonic()) / 60
                result = finished(config, form, seed)
                if result is None and minutes > 0:
                    result = run(config, form, seed, minutes, pool)
                if result is not None:
                    results[form][seed] = result
    summary = {form: summarize_form(of_seeds) for form, of_seeds in results.items() if of_seeds}
    out_dir, text = Path(config.out_dir), report(config, results)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("ablations.json", json.dumps(summary, indent=1)), ("ablations.md", text)):
        with replacing(out_dir / name) as temporary:
            temporary.write_text(content)
    print(text)
    return summary


def folder_of(config: AblationsConfig, form: str, seed: int) -> Path:
    return Path(config.out_dir) / f"{form}_{seed}"


def training_config(config: AblationsConfig, form: str, seed: int, minutes: float = 0.0) -> TrainDiTConfig:
    """The settings of a run: those of the form, in its own folders, with the seed and steps of the comparison."""
    folder = folder_of(config, form, seed)
    own = {
        "data_dir": config.data_dir,
        "model_dir": folder / "model",
        "run.out_dir": folder / "run",
        "run.seed": seed,
        "run.steps": config.steps,
        "run.device": config.device,
        "run.max_minutes": minutes if minutes < float("inf") else 0.0,
    }
    file = Path(config.configs) / f"{form}.toml"
    return load_config(TrainDiTConfig, [str(file), *config.overrides, *(f"{key}={own[key]}" for key in own)])


def settings_of(config: AblationsConfig, training: TrainDiTConfig) -> dict:
    """Return all that a result depends on, in the types of JSON."""
    run = dataclasses.replace(training.run, max_minutes=0.0)
    scoring = dataclasses.replace(config, forms=(), seeds=(0,), max_minutes=0.0, workers=0)
    both = dataclasses.replace(training, run=run), scoring
    return json.loads(json.dumps([dataclasses.asdict(settings) for settings in both]))


def finished(config: AblationsConfig, form: str, seed: int) -> dict | None:
    """The result of an earlier run with the same settings, or None."""
    file = folder_of(config, form, seed) / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    return result if result["settings"] == settings_of(config, training_config(config, form, seed)) else None


def run(config: AblationsConfig, form: str, seed: int, minutes: float, pool: Executor) -> dict | None:
    """Train and score one form; None if the time was over before the last step."""
    training = training_config(config, form, seed, minutes)
    for name in ("image_encoder", "sdf_vae"):
        if not (Path(training.model_dir) / f"{name}.safetensors").is_file():
            save_network(training.model_dir, name, load_network(config.start_from, name), torch.float16)
    print(f"{form}, seed {seed}", flush=True)
    if last_step(training.run.out_dir) < config.steps:
        train_dit.train(training)
    if last_step(training.run.out_dir) < config.steps:
        return None
    records = read_metrics(training.run.out_dir)
    result = {
        "settings": settings_of(config, training_config(config, form, seed)),
        "parameters": sum(p.numel() for p in load_network(training.model_dir, "latent_dit").parameters()),
        "seconds_per_step": float(np.median([record["seconds_per_step"] for record in records])),
        "scores": score(config, training, pool),
    }
    with replacing(folder_of(config, form, seed) / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


# --- scores


class Example(NamedTuple):
    """A picture of a shape with its latents."""

    name: str
    view: View
    seed: int
    latents: list[np.ndarray]  # coords (M, 3), mean and logvar (M, C)


def examples_of(config: AblationsConfig, training: TrainDiTConfig, views: Views) -> list[Example]:
    """One picture of each shape, drawn by its name."""
    examples = []
    for view in choose_views(views, 1, 0):
        name, R = views.names[view.shape], training.resolution
        latents = read_latents(latent_path(config.data_dir, R, name, view.symmetry))
        examples.append(Example(name, view, seed_of(0, name, views.files[view.shape][view.view].name), latents))
    return examples


def score(config: AblationsConfig, training: TrainDiTConfig, pool: Executor) -> dict[str, dict[str, float]]:
    """Score the exported model on each shape of the split: the loss, and the mesh that it makes on the structure."""
    device = find_device(config.device)
    encoder, vae, dit = (
        load_network(training.model_dir, name, device) for name in ("image_encoder", "sdf_vae", "latent_dit")
    )
    names, _ = list_shapes(config.data_dir, config.split, training.resolution)
    names = names[: config.limit or None]
    image_size = encoder.config.image_size
    views = Views(config.data_dir, names, image_size, training.turn_to_camera, augment=False)
    examples = examples_of(config, training, views)
    pictures = Pictures(views, [example.view for example in examples], config.batch_size)
    scoring = ScoreConfig(config.data_dir, training.resolution, config.num_points, config.cells, 0, config.level)
    scores, jobs = {}, {}
    for number, images in enumerate(load_batches(pictures, 0, len(pictures), 0, device)):
        batch = examples[number * config.batch_size : (number + 1) * config.batch_size]
        coords, mean, _ = zip(*(example.latents for example in batch), strict=True)
        voxels = Voxels(join_coords(coords).to(device), training.resolution // BLOCK, len(batch))
        with torch.no_grad(), autocast(training.run, device):
            tokens = encode_images(encoder, images.float() / 255, dit.config.sparse_context)
            x_0 = vae.normalize_latents(join(mean).float().to(device))
            losses = loss_of_samples(dit, tokens, x_0, voxels, [example.seed for example in batch], config, training)
            made = make_blocks(dit, vae, tokens, voxels, [example.seed for example in batch], config)
        for example, loss, blocks in zip(batch, losses.tolist(), made, strict=True):
            scores[example.name] = {"loss": loss}
            jobs[example.name] = pool.submit(compare_blocks, *blocks, example.name, example.view.symmetry, scoring)
    return {name: scores[name] | job.result() for name, job in jobs.items()}


def loss_of_samples(
    dit: LatentDiT,
    tokens: ImageTokens,
    x_0: Tensor,
    voxels: Voxels,
    seeds: list[int],
    config: AblationsConfig,
    training: TrainDiTConfig,
) -> Tensor:
    """The mean of eq. 11 over each sample and over times that divide their distribution in training evenly: (B,)."""
    shares = (torch.arange(config.times, dtype=torch.float64) + 0.5) / config.times
    times = torch.sigmoid(training.loss.time_mean + training.loss.time_std * torch.special.ndtri(shares)).float()
    losses = []
    for number, t in enumerate(times.tolist()):
        shapes = [(count, x_0.shape[1]) for count in voxels.counts]
        noise = noise_for([seed ^ (number + 1) for seed in seeds], shapes).to(x_0.device)
        velocity = dit(interpolate(x_0, noise, torch.tensor(t)), x_0.new_full((len(seeds),), t), voxels, tokens)
        error = (velocity.float() - velocity_target(x_0, noise)).square().mean(1, keepdim=True)
        losses.append(sample_means(error, samples_of(voxels))[:, 0])
    return torch.stack(losses).mean(0)


def make_blocks(
    dit: LatentDiT,
    vae: SDFVAE,
    tokens: ImageTokens,
    voxels: Voxels,
    seeds: list[int],
    config: AblationsConfig,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sample latents on the voxels and decode them: block coordinates (M, 3) and SDF (M, 8, 8, 8) of each sample."""
    noise = noise_for(seeds, [(count, dit.config.latent_channels) for count in voxels.counts]).to(voxels.device)
    velocity = guided_velocity(dit, tokens, config.guidance, voxels)
    latents = euler_sample(velocity, noise, time_schedule(config.sampling_steps, config.shift))
    return split_blocks(*vae.decode(vae.denormalize_latents(latents), voxels))


def compare_blocks(
    coords: np.ndarray, values: np.ndarray, name: str, symmetry: int, scoring: ScoreConfig
) -> dict[str, float]:
    """Compare a decoded SDF (M, 3), (M, 8, 8, 8) with the prepared shape, in a process of the pool."""
    result = Shape.of_blocks(coords, values, scoring, decoded=True)
    return compare(result, Shape.of_file(name, symmetry, scoring), scoring)


# --- the table


def by_shape(of_seeds: dict[int, dict], score: str) -> np.ndarray:
    """A score of each shape, averaged over the seeds: intervals are drawn over shapes."""
    return np.mean([[shape[score] for shape in result["scores"].values()] for result in of_seeds.values()], axis=0)


def summarize_form(of_seeds: dict[int, dict]) -> dict:
    """Summarise a form: each score over the shapes and by seed, parameters, and seconds per step."""
    summary: dict = {"seeds": sorted(of_seeds), "parameters": next(iter(of_seeds.values()))["parameters"]}
    summary["seconds_per_step"] = float(np.mean([result["seconds_per_step"] for result in of_seeds.values()]))
    for score, *_ in SCORES.values():
        means = {seed: float(by_shape({seed: result}, score).mean()) for seed, result in of_seeds.items()}
        summary[score] = summarize(by_shape(of_seeds, score)) | {"by_seed": means}
    return summary


def report(config: AblationsConfig, results: dict[str, dict[int, dict]]) -> str:
    """The tables in markdown: all forms, and their differences from the one that they are compared with."""
    done = {form: of_seeds for form, of_seeds in results.items() if of_seeds}
    missing = [f"{form} {seed}" for form in results for seed in config.seeds if seed not in results[form]]
    shapes = len(next(iter(next(iter(done.values())).values()))["scores"]) if done else 0
    head = (
        f"# Ablations of the latent DiT\n\n{config.steps} steps, seeds {', '.join(map(str, config.seeds))}, "
        f"{shapes} shapes of split {config.split}, one picture each. Means over seeds with 95 % bootstrap intervals "
        "over shapes; in brackets behind the loss, its least and greatest mean of a seed. Meshes are made on the true "
        f"structure: {config.sampling_steps} steps, guidance {config.guidance:g}.\n"
    )
    rows = []
    for form, of_seeds in done.items():
        summary = summarize_form(of_seeds)
        cells = [format_summary(summary[score], factor, digits) for score, factor, digits in SCORES.values()]
        by_seed = summary["loss"]["by_seed"].values()
        cells[0] += f" ({min(by_seed):.4f} to {max(by_seed):.4f})"
        minutes = summary["seconds_per_step"] * config.steps / 60
        cost = [f"{summary['parameters'] / 1e6:.2f}", f"{1e3 * summary['seconds_per_step']:.0f}", f"{minutes:.1f}"]
        rows.append([form, str(len(of_seeds)), *cells, *cost])
    header = ["form", "seeds", *SCORES, "M parameters", "ms per step", "minutes"]
    tables = [markdown_table(header, rows)]
    if base := done.get(config.compared_with):
        header = [f"minus {config.compared_with}", "seeds", *SCORES]
        tables.append(markdown_table(header, list(differences(done, base))))
    left = f"\nNot finished: {', '.join(missing)}; the same command continues.\n" if missing else ""
    return "\n".join([head, *tables]) + left


def differences(done: dict[str, dict[int, dict]], base: dict[int, dict]) -> Iterator[list[str]]:
    """Rows of each form's scores minus those of the base, shape by shape, over the seeds that both have."""
    for form, of_seeds in done.items():
        common = sorted(of_seeds.keys() & base.keys())
        if of_seeds is base or not common:
            continue
        cells = []
        for score, factor, digits in SCORES.values():
            ours, theirs = (by_shape({seed: some[seed] for seed in common}, score) for some in (of_seeds, base))
            cells.append(format_summary(summarize(ours - theirs), factor, digits))
        yield [form, str(len(common)), *cells]


if __name__ == "__main__":
    run_command(main, AblationsConfig)
