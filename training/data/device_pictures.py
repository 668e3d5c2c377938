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
from torch.utils.data import Dataset

from d3ds2.images.foreground import MARGIN, SIZE, preprocess
from d3ds2.kernels.device_constant import device_constant
from training.data.damaged_files import READ_ERRORS, first_readable
from training.data.datasets import StructureSteps
from training.data.loading import load_batches
from training.data.png_files import read_png
from training.data.views import (
    CROP_PROBABILITY,
    MAX_MARGIN,
    MAX_ROTATION,
    MIN_CROP,
    ROTATE_PROBABILITY,
    Drawn,
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
    grids: Tensor | None = None  # (B, 1, G, G, G) uint8 occupancy, where the latents are not on the device


class EveryPicture(Dataset):
    """All pictures as at inference, READ_AT_ONCE in a batch: (B, 4, S, S) uint8. Damaged ones are noted, and black."""

    def __init__(self, views: Views):
        self.views = views

    def __len__(self) -> int:
        return -(-int(self.views.first[-1]) // READ_AT_ONCE)

    def __getitem__(self, index: int) -> Tensor:
        first = index * READ_AT_ONCE
        return torch.stack([self._picture(n) for n in range(first, min(first + READ_AT_ONCE, self.views.first[-1]))])

    def _picture(self, number: int) -> Tensor:
        views = self.views
        shape = int(np.searchsorted(views.first, number, side="right")) - 1
        path = views.files[shape][number - int(views.first[shape])]
        try:
            image = views.damaged.read(number, lambda: read_png(path))
        except READ_ERRORS:
            return torch.zeros((4, views.image_size, views.image_size), dtype=torch.uint8)
        return (preprocess(image, views.image_size) * 255).round().byte()


class DevicePictures:
    """All pictures of `views` on the device.

    Attributes:
        images: (n, 4, S, S) uint8: RGB and mask.
    """

    def __init__(self, views: Views, device: torch.device, workers: int):
        S, pictures = views.image_size, EveryPicture(views)
        self.images = torch.empty((int(views.first[-1]), 4, S, S), dtype=torch.uint8, device=device)
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


class PictureChoices(StructureSteps):
    """`choices[step]` is a `Choice` of the same shapes as `StructureViews` with these arguments, see there.

    The pictures are in `DevicePictures`, which has noted the damaged ones; each is replaced by the shape's next one.
    """

    augment = False  # the device does it

    def load(self, step: int, chosen: np.ndarray | slice) -> Choice:
        """The choice of some samples (b,) of a step."""
        *columns, grids = zip(*self.each(step, chosen, self._read), strict=True)
        shapes, symmetries, pictures, mirrored = map(torch.tensor, columns)
        return Choice(shapes, symmetries, pictures, mirrored, self.stack(grids))

    def _read(self, drawn: Drawn) -> tuple[int, int, int, bool, np.ndarray | None]:
        shape, views = drawn.shape, self.views

        def read(view: int) -> int:
            return views.damaged.read(views.number(shape, view), lambda: view)

        view = first_readable(views.following(shape, drawn.view), read)
        symmetry = views.symmetry(shape, view, drawn.flip)
        return shape, symmetry, views.number(shape, view), bool(drawn.flip), self.grid(shape, symmetry)
