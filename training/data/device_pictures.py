"""All pictures of a run on the training device: for small pictures, which take longer to read than a step takes.

The pictures are decoded, cropped to the object and put on white once. The random part of a draw happens on the device:
mirroring, rotation, and the size and place of the object in its square (as in `training.data.views`).

Sizes: n pictures, B pictures of a batch, S pixels per edge.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.images.foreground import MARGIN, SIZE
from d3ds2.kernels.device_constant import device_constant
from training.data.batch_plans import draw, plan_shapes, shapes_per_batch
from training.data.datasets import load_batches
from training.data.steps import ViewSteps
from training.data.views import (
    CROP_PROBABILITY,
    MAX_MARGIN,
    MAX_ROTATION,
    MIN_CROP,
    ROTATE_PROBABILITY,
    Pictures,
    View,
    Views,
)
from training.losses import DrawRows, draw_all

READ_AT_ONCE = 64  # pictures


class Choice(NamedTuple):
    """The pictures of a step, and the shapes they show."""

    shapes: Tensor  # (B,) int64
    symmetries: Tensor  # (B,) int64
    pictures: Tensor  # (B,) int64, rows of `DevicePictures.images`
    mirrored: Tensor  # (B,) bool


class DevicePictures:
    """All pictures of `views` on the device.

    Attributes:
        images: (n, 4, S, S) uint8: RGB and mask.
        rows: (shapes + 1,) int64, the row of each shape's first view in `images`.
    """

    def __init__(self, views: Views, device: torch.device, workers: int):
        every = [View(shape, view, 0) for shape, files in enumerate(views.files) for view in range(len(files))]
        S = views.image_size
        self.rows = np.concatenate([[0], np.cumsum([len(files) for files in views.files])])
        self.images = torch.empty((len(every), 4, S, S), dtype=torch.uint8, device=device)
        pictures = Pictures(views, every, READ_AT_ONCE)
        for index, batch in enumerate(load_batches(pictures, 0, len(pictures), workers, device)):
            self.images[index * READ_AT_ONCE : index * READ_AT_ONCE + len(batch)] = batch

    def draw(
        self,
        choice: Choice,
        generator: torch.Generator,
        augment: bool = True,
        draw_samples: DrawRows = draw_all,
    ) -> Tensor:
        """Return the chosen pictures, mirrored and augmented: (B, 4, S, S) float32 in [0, 1].

        `draw_samples` is that of a part of a batch, see `training.data.parts`.
        """
        images = self.images[choice.pictures].float() / 255
        images = torch.where(choice.mirrored[:, None, None, None], images.flip(-1), images)
        return move_objects(images, generator, draw_samples) if augment else images


def move_objects(images: Tensor, generator: torch.Generator, draw_samples: DrawRows = draw_all) -> Tensor:
    """Rotate, crop and resize the object in each picture (B, 4, S, S) float; the surroundings are white.

    Each picture is rotated by up to 10° with probability 0.1, cropped to 0.9-1 of its edges with probability 0.1, and
    given a margin of 0-32 pixels of 518.
    """
    # drawn as (8, B)
    u = draw_samples(len(images), lambda B: torch.rand((8, B), generator=generator, device=generator.device).t())
    u = u.t().to(images.device)
    angle = torch.deg2rad(MAX_ROTATION * (2 * u[1] - 1)) * (u[0] < ROTATE_PROBABILITY)
    margin = MAX_MARGIN * u[2]
    scale = (SIZE - 2 * MARGIN) / (SIZE - 2 * margin)  # from coordinates of the result to those of the picture
    cropped = u[3] < CROP_PROBABILITY
    kept = torch.where(cropped, MIN_CROP + (1 - MIN_CROP) * torch.maximum(u[4], u[5]), 1.0)
    scale = scale * kept
    shift = (2 * u[6:8] - 1) * (1 - kept)  # the centre of the crop, (2, B)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    white = device_constant((1.0, 1.0, 1.0, 0.0), images.device, images.dtype)[:, None, None]
    return F.grid_sample(images - white, grid, mode="bilinear", align_corners=False) + white  # zeros outside are white


class PictureChoices(ViewSteps):
    """`choices[step]` is a `Choice` of the same shapes and symmetries as `StructureViews` with these arguments.

    `weights` (n,) say how often each shape of `views.names` is drawn, in proportion; None: all equally often.
    """

    def __init__(
        self,
        views: Views,
        pictures: DevicePictures,
        batch_size: int,
        views_per_shape: int,
        seed: int,
        weights: np.ndarray | None = None,
    ):
        self.views, self.rows, self.views_per_shape, self.seed = views, pictures.rows, views_per_shape, seed
        weights = None if weights is None else weights.repeat(2)
        num_shapes = shapes_per_batch(batch_size, views_per_shape)
        self.plan = plan_shapes(2 * len(views.names), num_shapes, seed, weights)

    def load(self, step: int, chosen: np.ndarray | slice) -> Choice:
        """The choice of some samples (b,) of a step."""
        shapes, mirrored = np.divmod(self.plan[step].repeat(self.views_per_shape), 2)
        rng = draw(self.seed, step, 2)
        choices = [self.views.choose(shape, flip, rng) for shape, flip in zip(shapes, mirrored, strict=True)]
        view, symmetries = np.array(choices).T
        columns = shapes, symmetries, self.rows[shapes] + view, mirrored.astype(bool)
        return Choice(*(torch.from_numpy(column[chosen]) for column in columns))
