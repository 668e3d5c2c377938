"""Time the first steps of every stage of the paper's recipe on one GPU, at the paper's sizes.

    python benchmarks/training_steps.py --out OUT

Trains every network of training/configs/paper on four made shapes of about Table 1's numbers of tokens, with the batch
of one of eight GPUs and random weights. Each stage runs `--steps` steps, or as many as fit into its share of
`--minutes`. Pictures are made, too; the image encoder has the size of DINOv2 Large. After each stage, prints a line and
writes OUT/training-<device>.md, a table of step time and peak memory beside what `training.plan` estimates, and
OUT/training-<device>.json. `--tiny` shrinks everything for a CPU. Needs neither trimesh nor embreex.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh  # noqa: E402
from d3ds2.networks.image_encoder import ImageEncoder  # noqa: E402
from d3ds2.networks.model_files import save_network  # noqa: E402
from tests.support.small_recipe import small_recipe  # noqa: E402
from training import plan  # noqa: E402
from training.data.index_files import update_index  # noqa: E402
from training.data.shape_files import save_shape, shape_path, view_folder  # noqa: E402
from training.data.shards import Shard  # noqa: E402
from training.gpus import GPUS, find_gpu  # noqa: E402
from training.recipe import Job, read_recipe  # noqa: E402
from training.run import read_metrics  # noqa: E402

RECIPE = ROOT / "training" / "configs" / "paper"
GPUS_OF_THE_PAPER = 8
SAVING_SECONDS = 30.0  # that a stage takes beside its steps: 28 to 36 for the large transformers on an H200
# half axes of the shapes, which decide the number of tokens
SHAPES = {"plate": (1.0, 0.28, 0.62), "pill": (0.55, 0.5, 1.0), "egg": (0.6, 0.45, 1.0), "lens": (1.0, 0.35, 0.5)}
WARM_UP = 5  # steps that compile kernels


def made_mesh(axes: tuple[float, float, float], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a rippled ellipsoid with `number` meridians: vertices (V, 3) and faces (F, 3)."""
    theta = np.linspace(0, np.pi, number // 2 + 1)[1:-1]
    phi = np.linspace(0, 2 * np.pi, number, endpoint=False)
    t, p = (x.ravel() for x in np.meshgrid(theta, phi, indexing="ij"))
    directions = np.stack([np.sin(t) * np.cos(p), np.cos(t), np.sin(t) * np.sin(p)], axis=1)
    directions = np.concatenate([directions, [[0, 1, 0], [0, -1, 0]]])
    ripple = 1 + 0.03 * np.sin(9 * directions[:, 0]) * np.sin(7 * directions[:, 1]) * np.sin(8 * directions[:, 2])
    rings, last = len(theta), len(t)
    i, j = (x.ravel() for x in np.meshgrid(np.arange(rings - 1), np.arange(number), indexing="ij"))
    a, b = i * number + j, i * number + (j + 1) % number
    sides = np.concatenate([np.stack([a, b, a + number], 1), np.stack([b, b + number, a + number], 1)])
    j = np.arange(number)
    north = np.stack([np.full(number, last), (j + 1) % number, j], 1)
    south = (rings - 1) * number + np.stack([j, (j + 1) % number, np.zeros_like(j)], 1)
    south[:, 2] = last + 1
    return directions * ripple[:, None] * axes, np.concatenate([sides, north, south])


def make_shape(data_dir: str, name: str, resolutions: list[int]) -> dict:
    """Write the SDF files and the pictures of a shape; return its record in the index."""
    vertices, faces = made_mesh(SHAPES[name], 256)
    tokens = {}
    for R in resolutions:
        sdf = mesh_to_sdf(normalize_mesh(vertices), faces, R, threads=1)
        save_shape(shape_path(data_dir, R, name), sdf)
        tokens[str(R)] = len(sdf.block_coords)
    folder = view_folder(data_dir, name)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    y, x = np.mgrid[-1:1:1024j, -1:1:1024j]
    views = []
    for number in range(4):
        picture = np.broadcast_to(rng.integers(0, 255, 3, dtype=np.uint8), (1024, 1024, 3))
        inside = (x / SHAPES[name][0]) ** 2 + (y / SHAPES[name][1]) ** 2 < 0.8
        rgba = np.dstack([picture, (255 * inside).astype(np.uint8)])
        Image.fromarray(rgba).save(folder / f"{number:03d}.png", compress_level=1)
        views.append({"file": f"{number:03d}.png", "camera": {"azimuth": 0.0}})
    (folder / "cameras.json").write_text(json.dumps({"views": views}))
    return {"name": name, "source": "made", "split": "train", "num_tokens": tokens}


def make_data(data_dir: str, resolutions: list[int]) -> None:
    """Write all shapes, each in a process of its own."""
    for R in resolutions:
        shape_path(data_dir, R, "").parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        records = list(pool.map(make_shape, [data_dir] * len(SHAPES), SHAPES, [resolutions] * len(SHAPES)))
    update_index(data_dir, Shard(), records, lambda record: False)


def jobs_in(folder: Path, steps: int, tiny: bool) -> list[Job]:
    """The recipe's stages that need a GPU, with one GPU's share of each batch."""
    overrides = [f"data_dir={folder}/data", f"model_dir={folder}/model", f"run.steps={steps}", "run.tensorboard=false"]
    overrides += ["run.log_every=1", "run.save_every=1000000", "run.workers=2", "pretrained_encoder="]
    if tiny:
        skipped = ("prepare_shapes.", "render_views.", "run.steps=")
        overrides += [o for o in small_recipe(steps) if not o.startswith(skipped)]
    scripts = ("train_vae", "train_structure_vae", "train_structure_dit", "encode_latents", "train_dit")
    jobs = read_recipe(str(RECIPE), overrides, scripts)
    if tiny:
        return jobs
    shares = []
    for job in jobs:
        if job.run is not None:
            shares.append(f"{job.stage.name}.batch_size={job.config.batch_size // GPUS_OF_THE_PAPER}")
        if hasattr(job.config, "max_tokens") and job.run is not None:
            shares.append(f"{job.stage.name}.max_tokens={job.config.max_tokens // GPUS_OF_THE_PAPER}")
    return read_recipe(str(RECIPE), [*overrides, *shares], scripts)


def run_stage(job: Job, seconds: float, folder: Path) -> dict:
    """Run a stage for some seconds; return its result."""
    module, config, cuda = (
        importlib.import_module(f"training.{job.stage.script}"),
        job.config,
        torch.cuda.is_available(),
    )
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    if job.run is None:
        module.main(config)
        steps, seconds_per_step, loss, tokens = 0, None, None, None
    else:
        out_dir = str(folder / "runs" / job.stage.name)
        run = dataclasses.replace(config.run, out_dir=out_dir, max_minutes=seconds / 60)
        module.train(dataclasses.replace(config, run=run))
        records = read_metrics(out_dir)
        shutil.rmtree(out_dir)
        timed = [record["seconds_per_step"] for record in records[WARM_UP:]] or [records[-1]["seconds_per_step"]]
        steps, seconds_per_step = len(records), statistics.median(timed)
        loss, tokens = records[-1]["loss"], records[-1].get("tokens")
    peak = torch.cuda.max_memory_allocated() / plan.GIB if cuda else None
    return {
        **{"stage": job.stage.name, "steps": steps, "seconds_per_step": seconds_per_step, "peak_gib": peak},
        **{"tokens": tokens, "loss": loss, "seconds": time.perf_counter() - before},
    }


def planned(jobs: list[Job]) -> dict[str, tuple[float, float]]:
    """The seconds of a step and the GiB that the plan estimates for each stage on this GPU."""
    gpu = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else GPUS["H200"]
    if gpu is None:
        return {}
    machine, known = plan.Machine(1, gpu, len(SHAPES)), {}
    costs = {job.stage.name: plan.cost_of(job, machine, known) for job in jobs}
    return {name: (plan.seconds_of(cost, machine), plan.gib_of(cost)) for name, cost in costs.items()}


def report(results: list[dict], estimates: dict[str, tuple[float, float]], device: str) -> str:
    """The table of all results so far."""
    rows = [
        "| stage | steps | tokens | s a step | planned | peak GiB | planned | loss | whole stage s |",
        "|---" * 9 + "|",
    ]
    for result in results:
        seconds, gib = estimates.get(result["stage"], (None, None)) if result["steps"] else (None, None)
        values = [
            *(result["tokens"], result["seconds_per_step"], seconds),
            *(result["peak_gib"], gib, result["loss"], result["seconds"]),
        ]
        cells = ["" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        rows.append(f"| {result['stage']} | {result['steps'] or ''} | {' | '.join(cells)} |")
    text = f"# The first steps of the paper's recipe\n\n{datetime.date.today()}, {device}, torch {torch.__version__}. "
    text += f"`python benchmarks/training_steps.py`\n\nOne GPU with its share of the batch, 1/{GPUS_OF_THE_PAPER}; "
    text += "made shapes, random weights. Seconds are the median of the steps after the first five.\n\n"
    return text + "\n".join(rows) + "\n"


@contextlib.contextmanager
def work_folder(given: str | None) -> Iterator[Path]:
    """A folder for data, checkpoints and models, which is removed: in memory where there is room for it."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30
    folder = Path(tempfile.mkdtemp(prefix="training_", dir=given or (memory if roomy else None)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables")
    parser.add_argument("--steps", type=int, default=50, help="of each stage")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--stages", nargs="*", help="only these; each needs what the ones before it write")
    parser.add_argument("--work", help="folder for data and checkpoints, 25 GiB; default: in memory if it fits")
    parser.add_argument("--tiny", action="store_true", help="small networks and shapes, for a CPU")
    options = parser.parse_args()
    started = time.perf_counter()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name = device.removeprefix("NVIDIA ").lower().replace(" ", "-") + ("-tiny" if options.tiny else "")
    options.out.mkdir(parents=True, exist_ok=True)
    with work_folder(options.work) as folder:
        jobs = jobs_in(folder, options.steps, options.tiny)
        chosen = [job for job in jobs if not options.stages or job.stage.name in options.stages]
        make_data(f"{folder}/data", [32, 48, 64, 128] if options.tiny else [256, 384, 512, 1024])
        print(f"made {len(SHAPES)} shapes in {time.perf_counter() - started:.0f} s", flush=True)
        save_encoder(folder, jobs)
        results, estimates = [], planned(jobs)
        for place, job in enumerate(chosen):
            left = started + 60 * options.minutes - time.perf_counter()
            seconds = max(3.0, left / (len(chosen) - place) - SAVING_SECONDS)
            results.append(run_stage(job, seconds, folder))
            print(f"[{place + 1}/{len(chosen)}] {json.dumps(results[-1])}", flush=True)
            (options.out / f"training-{name}.json").write_text(json.dumps(results, indent=1))
            (options.out / f"training-{name}.md").write_text(report(results, estimates, device))
    print(report(results, estimates, device))
    print(f"{time.perf_counter() - started:.0f} s in all; tables in {options.out}", flush=True)


def save_encoder(folder: Path, jobs: list[Job]) -> None:
    """Write an image encoder with random weights, which the structure DiT leaves unchanged."""
    config = next(job.config for job in jobs if job.stage.script == "train_structure_dit")
    torch.manual_seed(0)
    save_network(folder / "model", "image_encoder", ImageEncoder(config.image_encoder), torch.float16)


if __name__ == "__main__":
    main()
