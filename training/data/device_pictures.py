"""All pictures of a run on the training device: for small pictures, which take longer to read than a step takes.

The pictures are decoded, cropped to the object and put on white once. The random part of a draw happens on the device:
mirroring, rotation, and the size and place of the object in its square (as in `training.data.views`).

Point maps (`training.data.point_maps`) can stand beside them, and move along.

Sizes: n pictures, B pictures of a batch, S pixels per edge, E = S/4 cells per edge of a point map.
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
from training.data.datasets import Choice, StructureSteps
from training.data.latent_views import ChosenLatents, LatentSteps, joined
from training.data.loading import load_batches
from training.data.png_files import read_png
from training.data.point_maps import point_map_of, read_point_map
from training.data.symmetry import NUM_SYMMETRIES, transform_vertices
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
CELL = 4  # pixels per edge of a cell of a point map
# of the symmetries, by which a point is multiplied, row by row
MATRICES = tuple(
    tuple(transform_vertices(np.eye(3), symmetry).T.ravel().tolist()) for symmetry in range(NUM_SYMMETRIES)
)


class PictureBatch(NamedTuple):
    """Pictures, and their point maps if there are any."""

    images: Tensor  # (B, 4, S, S): RGB and mask
    points: Tensor | None = None  # (B, 4, E, E): x, y, z and where the mesh is seen


class EveryPicture(Dataset):
    """All pictures as at inference, READ_AT_ONCE in a batch, as uint8. Damaged ones are noted, and black."""

    def __init__(self, views: Views, with_points: bool = False):
        self.views, self.with_points = views, with_points

    def __len__(self) -> int:
        return -(-int(self.views.first[-1]) // READ_AT_ONCE)

    def __getitem__(self, index: int) -> PictureBatch:
        first = index * READ_AT_ONCE
        each = [self._picture(n) for n in range(first, min(first + READ_AT_ONCE, self.views.first[-1]))]
        images, points = zip(*each, strict=True)
        return PictureBatch(torch.stack(images), torch.stack(points) if self.with_points else None)

    def _picture(self, number: int) -> tuple[Tensor, Tensor | None]:
        views, S = self.views, self.views.image_size
        shape = int(np.searchsorted(views.first, number, side="right")) - 1
        path = views.files[shape][number - int(views.first[shape])]

        def read() -> tuple[Tensor, Tensor | None]:
            image, points = read_png(path), None
            if self.with_points:
                points = torch.from_numpy(read_point_map(image, path, S, S // CELL)).permute(2, 0, 1)
            return (preprocess(image, S) * 255).round().byte(), points

        try:
            return views.damaged.read(number, read)
        except READ_ERRORS:
            black = torch.zeros((4, S, S), dtype=torch.uint8)
            return black, black[:, ::CELL, ::CELL] if self.with_points else None


class DevicePictures:
    """All pictures of `views` on the device.

    Attributes:
        images: (n, 4, S, S) uint8: RGB and mask.
        points: (n, 4, E, E) uint8, the point maps; None without `with_points`.

    Raises:
        FileNotFoundError: the views have no point maps.
    """

    def __init__(self, views: Views, device: torch.device, workers: int, with_points: bool = False):
        n, S = int(views.first[-1]), views.image_size
        if with_points and not point_map_of(views.files[0][0]).is_file():
            raise FileNotFoundError(
                f"expected the point map {point_map_of(views.files[0][0])}; render the views with points=128"
            )
        pictures = EveryPicture(views, with_points)
        self.images = torch.empty((n, 4, S, S), dtype=torch.uint8, device=device)
        self.points = self.images.new_empty((n, 4, S // CELL, S // CELL)) if with_points else None
        for index, batch in enumerate(load_batches(pictures, 0, len(pictures), workers, device)):
            rows = slice(index * READ_AT_ONCE, index * READ_AT_ONCE + len(batch.images))
            self.images[rows] = batch.images
            if self.points is not None:
                self.points[rows] = batch.points

    def draw(
        self,
        choice: Choice,
        generator: torch.Generator,
        augment: bool = True,
        draw_samples: DrawRows = draw_all,
    ) -> PictureBatch:
        """Return the chosen pictures, mirrored and augmented: float32, RGB and mask in [0, 1].

        The points are those of the shape as it is turned and mirrored, x, y, z in [-1, 1], multiplied by the share of
        a cell that sees the mesh, which comes last.

        `draw_samples` is that of a part of a batch, see `training.data.parts`.
        """
        mirrored = choice.mirrored[:, None, None, None]
        images = self.images[choice.pictures].float() / 255
        images, points = torch.where(mirrored, images.flip(-1), images), None
        if self.points is not None:
            points = turn_points(self.points[choice.pictures].float() / 255, choice.symmetries)
            points = torch.where(mirrored, points.flip(-1), points)
        pictures = PictureBatch(images, points)
        return augmented(pictures, generator, draw_samples) if augment else pictures


def augmented(pictures: PictureBatch, generator: torch.Generator, draw_samples: DrawRows = draw_all) -> PictureBatch:
    """Move pictures with the margin of inference at random, see `draw_motions`, and their points with them."""
    images, points = pictures
    motions = draw_motions(len(images), images.device, generator, draw_samples)
    white = device_constant((1.0, 1.0, 1.0, 0.0), images.device, images.dtype)[:, None, None]
    moved = move(images - white, motions) + white  # zeros outside are white
    return PictureBatch(moved, None if points is None else move(points, motions))


def turn_points(pixels: Tensor, symmetries: Tensor) -> Tensor:
    """Turn and mirror the points of maps (B, 4, E, E) in [0, 1] as symmetries (B,) move the shapes; see `draw`."""
    matrix = device_constant(MATRICES, pixels.device, pixels.dtype).unflatten(1, (3, 3))[symmetries]
    is_seen = pixels[:, 3:]
    points = torch.einsum("bij,bjyx->biyx", matrix, 2 * pixels[:, :3] - 1)
    return torch.cat([points * is_seen, is_seen], dim=1)


def draw_motions(
    number: int, device: torch.device, generator: torch.Generator, draw_samples: DrawRows = draw_all
) -> Tensor:
    """Draw how pictures with the margin of inference are augmented: (number, 2, 3), from the result to the picture.

    Each is rotated by up to 10° with probability 0.1, cropped to 0.9-1 of its edges with probability 0.1, and
    given a margin of 0-32 pixels of 518.
    """
    # drawn as (8, B)
    u = draw_samples(number, lambda B: torch.rand((8, B), generator=generator, device=generator.device).t())
    u = u.t().to(device)
    angle = torch.deg2rad(MAX_ROTATION * (2 * u[1] - 1)) * (u[0] < ROTATE_PROBABILITY)
    margin = MAX_MARGIN * u[2]
    scale = (SIZE - 2 * MARGIN) / (SIZE - 2 * margin)  # from coordinates of the result to those of the picture
    cropped = u[3] < CROP_PROBABILITY
    kept = torch.where(cropped, MIN_CROP + (1 - MIN_CROP) * torch.maximum(u[4], u[5]), 1.0)
    scale = scale * kept
    shift = (2 * u[6:8] - 1) * (1 - kept)  # the centre of the crop, (2, B)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)


def move(images: Tensor, motions: Tensor) -> Tensor:
    """Move images (B, C, H, W); what comes in from outside is zero."""
    grid = F.affine_grid(motions, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


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
        shape, symmetry, picture, mirrored = choose(self.views, drawn)
        return shape, symmetry, picture, mirrored, self.grid(shape, symmetry)


class LatentChoices(LatentSteps):
    """Latents for the latent DiT, and the choice of their pictures: `choices[step]` is a `ChosenLatents`."""

    augment = False  # the device does it

    def load(self, step: int, chosen: np.ndarray | slice) -> ChosenLatents:
        """The batch of the chosen samples (b,) of a step."""
        latents, choices = zip(*self.each(step, chosen, self._choose), strict=True)
        columns = map(torch.tensor, zip(*choices, strict=True))
        return ChosenLatents(*joined(latents), Choice(*columns))

    def _choose(self, drawn: Drawn) -> tuple[list[np.ndarray], tuple[int, int, int, bool]]:
        choice = shape, symmetry, *_ = choose(self.views, drawn)
        return self.latents(shape, symmetry), choice


def choose(views: Views, drawn: Drawn) -> tuple[int, int, int, bool]:
    """Return the shape, symmetry, row and flip of the drawn picture, or of the shape's next one that is not damaged."""

    def read(view: int) -> int:
        return views.damaged.read(views.number(drawn.shape, view), lambda: view)

    view = first_readable(views.following(drawn.shape, drawn.view), read)
    symmetry = views.symmetry(drawn.shape, view, drawn.flip)
    return drawn.shape, symmetry, views.number(drawn.shape, view), bool(drawn.flip)
