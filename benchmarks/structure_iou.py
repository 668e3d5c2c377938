"""Measure the structure stage alone: IoU of occupied latent voxels on unseen shapes, beside the mean structure.

    python -m benchmarks.structure_iou data/tiny d3ds2/weights/tiny --split val --every 4 --guidance 1 2

Reads the files of prepare_shapes and render_views. Takes the first view of every n-th shape of the split. The mean
structure averages the unturned shapes of another split, and is cut at the level that fits that split best.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from d3ds2.images.image_file import load_image
from d3ds2.pipeline import TINY, load_pipeline
from d3ds2.rectified_flow import euler_sample, guided_velocity, noise_for, time_schedule
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
    parser.add_argument("--mean-split", default="test", help="split whose structures are averaged")
    parser.add_argument("--meshes", help="only shapes of the mesh folder of this name, where several were prepared")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, default=12)
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
        cameras = json.loads((files[0].parent / "cameras.json").read_text())["views"]
        truth.append(occupancy(arguments.data_dir, R, name, facing(cameras[0]["camera"]["azimuth"])[0]))
    truth = np.stack(truth)
    scores = iou(mean_structure(arguments.data_dir, arguments.mean_split, R), truth)
    print(f"{len(truth)} shapes of {arguments.split}, {truth.sum((1, 2, 3)).mean():.0f} occupied voxels on average")
    print(f"mean structure of {arguments.mean_split}: IoU {scores.mean():.3f}, median {np.median(scores):.3f}")

    image_tokens = pipeline.encode_image([load_image(files[0]) for files in views.files])
    config = pipeline.structure_dit.config
    noise = noise_for(list(range(len(truth))), [(1, config.latent_channels, *(config.resolution,) * 3)] * len(truth))
    noise = noise.to(arguments.device)
    for scale in arguments.guidance:
        velocity = guided_velocity(pipeline.structure_dit, image_tokens, scale)
        latents = euler_sample(velocity, noise, time_schedule(arguments.steps, sampling.structure_shift))
        logits = pipeline.structure_vae.decode(pipeline.structure_vae.denormalize_latents(latents))[:, 0]
        made = (logits.sigmoid() >= pipeline.structure_vae.config.threshold).cpu().numpy()
        scores = iou(made, truth)
        print(
            f"guidance {scale}: IoU {scores.mean():.3f}, median {np.median(scores):.3f}, "
            f"{made.sum((1, 2, 3)).mean():.0f} voxels",
            flush=True,
        )


if __name__ == "__main__":
    main()
