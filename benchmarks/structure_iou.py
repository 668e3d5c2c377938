"""Measure the structure stage alone: IoU of occupied latent voxels on unseen shapes, beside the mean structure.

    python -m benchmarks.structure_iou data/tiny d3ds2/weights/tiny --split val --every 4 --guidance 1 2
    python -m benchmarks.structure_iou data/tiny --split test --mean-split none --views 1 2 4 --rescale 0 0.7
    python -m benchmarks.structure_iou data/tiny --split test --mean-split none --intervals 0-1 0.5-1 --samplers heun
    python -m benchmarks.structure_iou data/tiny --guidance 1 --steps 1 --thresholds 0.1 0.2 --mirrored

Reads the files of prepare_shapes and render_views. Takes the first views of every n-th shape of the split. The mean
structure averages the unturned shapes of another split, and is cut at the level that fits that split best.

Every combination of the listed values is a row. Beside its IoU stands the mean difference to the first row, shape by
shape, with the half width of a 95 % interval. A pass is one evaluation of the network for one sample.

Views of one shape must be turned to the camera in the same way (see training/data/symmetry.py): such are the views of
tiny_test_views.toml, at most 45 degrees from the front.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from d3ds2.images.image_file import load_image
from d3ds2.pipeline import TINY, load_pipeline
from d3ds2.rectified_flow import SAMPLERS, Sampler, euler_sample, mean_velocity, noise_for
from training.data.shape_files import BLOCK, list_records, list_shapes, load_shape, shape_path
from training.data.symmetry import facing
from training.data.views import Views


def occupancy(data_dir: str, resolution: int, name: str, symmetry: int = 0) -> np.ndarray:
    """Mark the occupied latent voxels of a prepared shape: (G, G, G) bool."""
    grid = np.zeros((resolution // BLOCK,) * 3, dtype=bool)
    grid[tuple(load_shape(shape_path(data_dir, resolution, name), symmetry).block_coords.T)] = True
    return grid


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of grids (..., G, G, G): (...)."""
    axes = (-3, -2, -1)
    return (a & b).sum(axes) / np.maximum((a | b).sum(axes), 1)


def mean_structure(data_dir: str, split: str, resolution: int) -> np.ndarray:
    """Cut the mean of a split's structures at the level that fits them best: (G, G, G) bool."""
    shapes = np.stack([occupancy(data_dir, resolution, name) for name in list_shapes(data_dir, split, resolution)[0]])
    mean = shapes.mean(0)
    return max((mean > level for level in np.arange(0.05, 0.5, 0.05)), key=lambda cut: iou(cut, shapes).mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir")
    parser.add_argument("model_dir", nargs="?", default=str(TINY))
    parser.add_argument("--split", default="val")
    parser.add_argument("--mean-split", default="test", help="split whose structures are averaged, or none")
    parser.add_argument("--meshes", help="only shapes of the mesh folder of this name, where several were prepared")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[12])
    parser.add_argument("--views", type=int, nargs="+", default=[1], help="pictures of each shape")
    parser.add_argument("--intervals", nargs="+", default=["0-1"], help="times between which guidance acts")
    parser.add_argument("--rescale", type=float, nargs="+", default=[0.0], help="of guidance")
    parser.add_argument("--thresholds", type=float, nargs="+", help="probabilities; default: the model's")
    parser.add_argument("--mirrored", action="store_true", help="average with the prediction for mirrored pictures")
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=["euler"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    pipeline = load_pipeline(arguments.model_dir, torch.device(arguments.device))
    R, sampling = pipeline.sampling.sdf_resolution, pipeline.sampling
    records = list_records(arguments.data_dir, arguments.split, R)
    names = [r["name"] for r in records if arguments.meshes in (None, Path(r.get("meshes", "")).name)]
    names = names[:: arguments.every]
    views = Views(arguments.data_dir, names, pipeline.image_encoder.config.image_size, augment=False)
    truth = []
    for name, files in zip(views.names, views.files, strict=True):
        cameras = json.loads((files[0].parent / "cameras.json").read_text())["views"][: max(arguments.views)]
        turns = {facing(camera["camera"]["azimuth"])[0] for camera in cameras}
        if len(turns) > 1 or len(cameras) < max(arguments.views):
            parser.error(f"expected {max(arguments.views)} views of {name} from one side, got turns {turns}")
        truth.append(occupancy(arguments.data_dir, R, name, turns.pop()))
    truth = np.stack(truth)
    print(f"{len(truth)} shapes of {arguments.split}, {truth.sum((1, 2, 3)).mean():.0f} occupied voxels on average")
    if arguments.mean_split != "none":
        scores = iou(mean_structure(arguments.data_dir, arguments.mean_split, R), truth)
        print(f"mean structure of {arguments.mean_split}: IoU {scores.mean():.3f}, median {np.median(scores):.3f}")

    count = max(arguments.views)
    pixels = pipeline.crop_views([[load_image(file) for file in files[:count]] for files in views.files])
    sides = [[pipeline.encode_pixels(each) for each in pixels]]
    if arguments.mirrored:
        sides.append([pipeline.encode_pixels(each.flip(-1)) for each in pixels])
    dit, config = pipeline.structure_dit, pipeline.structure_dit.config
    noise = noise_for(list(range(len(truth))), [(1, config.latent_channels, *(config.resolution,) * 3)] * len(truth))
    noise, passes, first = noise.to(arguments.device), [], None
    own_threshold = sampling.structure_threshold or pipeline.structure_vae.config.threshold
    dit.register_forward_pre_hook(lambda _dit, inputs: passes.append(len(inputs[0])))
    options = (arguments.guidance, arguments.views, arguments.intervals, arguments.rescale, arguments.samplers)
    for scale, number, interval, rescale, method, steps in itertools.product(*options, arguments.steps):
        low, high = map(float, interval.split("-"))
        sampler = Sampler(method, (low, high), rescale)
        passes.clear()
        begin = time.process_time()
        times, latents = sampler.schedule(steps, sampling.structure_shift), []
        for tokens in sides:
            velocity = mean_velocity(dit, tokens[:number], scale, sampler=sampler)
            latents.append(euler_sample(velocity, noise, times, method=method))
        seconds = time.process_time() - begin
        logits = pipeline.structure_logits(latents[0])[:, 0]
        if arguments.mirrored:
            logits = (logits + pipeline.structure_logits(latents[1])[:, 0].flip(1)) / 2  # x
        for threshold in arguments.thresholds or [own_threshold]:
            made = (logits.sigmoid() >= threshold).cpu().numpy()
            scores = iou(made, truth)
            first = scores if first is None else first
            change = scores - first
            half_width = 1.96 * change.std(ddof=1) / len(change) ** 0.5
            print(
                f"guidance {scale}, {number} views, interval {interval}, rescale {rescale}, {method} {steps} steps, "
                f"threshold {threshold}: IoU {scores.mean():.3f} ({change.mean():+.4f} ± {half_width:.4f}), "
                f"median {np.median(scores):.3f}, {made.sum((1, 2, 3)).mean():.0f} voxels; "
                f"{sum(passes) / len(truth):.0f} passes, {seconds:.1f} s of CPU time",
                flush=True,
            )


if __name__ == "__main__":
    main()
