"""Measure how well the tokens of image encoders tell where in space each patch sees the object.

    python -m training.render_views training/configs/tiny_views.toml data_dir=data/seen views=2 points=128 limit=500
    python -m training.render_views training/configs/tiny_views.toml data_dir=data/new views=2 points=128 \\
        'splits=["val"]'
    python -m benchmarks.point_probe data/seen data/new d3ds2/weights/tiny models/mine

Fits a ridge regression from the tokens to the points on the first folder's pictures, and prints its mean distance to
the true points there and in the second folder, in units of the cube [-1, 1]³, beside that of the mean point.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.networks.image_encoder import ImageEncoder
from d3ds2.networks.model_files import load_network
from training.data.datasets import Choice
from training.data.device_pictures import DevicePictures, PictureBatch
from training.data.views import Views
from training.point_loss import patch_features, points_of_cells

CPU = torch.device("cpu")
RIDGE = 10.0
AT_ONCE = 16  # pictures


def pictures_of(data_dir: str, size: int, workers: int) -> PictureBatch:
    """Read all pictures of a folder, and their points as the shapes are turned to the camera."""
    names = sorted(folder.name for folder in Path(data_dir, "views").iterdir())
    views = Views(data_dir, names, size, augment=False)
    number = int(views.first[-1])
    shapes = np.searchsorted(views.first, np.arange(number), side="right") - 1
    turns = [views.symmetry(int(shape), int(i - views.first[shape]), 0) for i, shape in enumerate(shapes)]
    unflipped = torch.zeros(number, dtype=torch.bool)
    choice = Choice(torch.from_numpy(shapes), torch.tensor(turns), torch.arange(number), unflipped)
    return DevicePictures(views, CPU, workers, with_points=True).draw(choice, torch.Generator(), augment=False)


@torch.no_grad()
def tokens_and_points(encoder: ImageEncoder, pictures: PictureBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return, of all patches that see the object, tokens with a one (n, C + 1), points (n, 3), and pictures (n,)."""
    patches = encoder.config.image_size // encoder.config.patch_size
    features = torch.cat([patch_features(encoder(images), patches) for images in pictures.images.split(AT_ONCE)])
    points, seen = points_of_cells(pictures.points, patches)
    points, seen = points.flatten(2).transpose(1, 2), seen.flatten(1)  # (B, P², 3), (B, P²)
    return F.pad(features[seen], (0, 1), value=1.0).double(), points[seen].double(), seen.nonzero()[:, 0]


def mean_distance(predicted: Tensor, points: Tensor, picture: Tensor) -> float:
    """Average the distances (n,) of each picture, and these means."""
    distances, (_, rows, counts) = (
        (predicted - points).norm(dim=1),
        picture.unique(return_inverse=True, return_counts=True),
    )
    return (torch.zeros(len(counts)).double().index_add(0, rows, distances) / counts).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seen", help="data_dir whose pictures the regression learns from")
    parser.add_argument("new", help="data_dir of other shapes")
    parser.add_argument("models", nargs="+", help="model folders, whose encoders read pictures of the same size")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    encoders = {model: load_network(model, "image_encoder").float().eval() for model in arguments.models}
    sizes = {encoder.config.image_size for encoder in encoders.values()}
    if len(sizes) > 1:
        parser.error(f"expected encoders that read pictures of the same size, got {sorted(sizes)}")
    (size,) = sizes
    pictures = [pictures_of(folder, size, arguments.workers) for folder in (arguments.seen, arguments.new)]
    print(f"{len(pictures[0].images)} and {len(pictures[1].images)} pictures")
    for place, (model, encoder) in enumerate(encoders.items()):
        (X, Y, of), (x, y, of_new) = (tokens_and_points(encoder, each) for each in pictures)
        if not place:
            mean = Y.mean(0)
            print(f"mean point: {mean_distance(mean, Y, of):.4f} seen, {mean_distance(mean, y, of_new):.4f} new")
        weights = torch.linalg.solve(X.T @ X + RIDGE * torch.eye(X.shape[1]).double(), X.T @ Y)
        print(f"{model}: {mean_distance(X @ weights, Y, of):.4f} seen, {mean_distance(x @ weights, y, of_new):.4f} new")


if __name__ == "__main__":
    main()
