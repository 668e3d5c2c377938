"""Rendered views as the image encoder reads them, with the augmentation of the paper.

A shape is turned by quarter turns until the camera of its picture stands in front of it (see `symmetry`); with
`turn_to_camera` false, as in the paper, it is not turned. Each picture is rotated by up to 10° with probability 0.1,
cropped to 0.9-1 of its edges with probability 0.1, cropped to the object, and put on a white square with a margin of
0-32 pixels of 518. [B/C: see docs/paper.md]

Sizes: B pictures, S pixels per edge.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from d3ds2.images.foreground import MARGIN, preprocess
from training.data.cameras import read_cameras
from training.data.damaged_files import READ_ERRORS, DamagedFiles, first_readable
from training.data.png_files import read_png
from training.data.symmetry import MIRROR

ROTATE_PROBABILITY, MAX_ROTATION = 0.1, 10.0  # degrees
CROP_PROBABILITY, MIN_CROP = 0.1, 0.9
MAX_MARGIN = 32  # pixels of 518, as `MARGIN` at inference


class Views:
    """The pictures of some shapes. The picture of a mirrored shape is the flipped picture of the shape.

    Args:
        data_dir: holds views/<name>/*.png (RGBA) and cameras.json of render_views.
        names: the shapes wanted. The attribute `names` lists those that have pictures; the others are left out.
        image_size: pixels per edge of a drawn picture, S.
        turn_to_camera: turn the shape until the camera is in front of it; else only mirror.
        augment: rotate, crop and vary the margin; else prepare pictures as at inference.
        cache: decode all pictures now and keep them in memory, shared with forked workers.

    Raises:
        FileNotFoundError: none of the shapes has a picture.
        TooManyDamagedError: too many of the files that list a shape's pictures are damaged.
    """

    def __init__(
        self,
        data_dir: str,
        names: list[str],
        image_size: int,
        turn_to_camera: bool = True,
        augment: bool = True,
        cache: bool = False,
    ):
        cameras = read_cameras(data_dir, names, turn_to_camera)
        self.names, self.files, self.turns = cameras.names, cameras.files, cameras.turns
        if not self.names:
            raise FileNotFoundError(
                f"expected pictures in {data_dir}/views/<name>/; make them with python -m training.render_views"
            )
        self.image_size, self.augment = image_size, augment
        self.first = cameras.first  # the number of each shape's first picture, among all
        self.damaged = DamagedFiles(int(self.first[-1]), "render_views")
        self.cache = {}
        if cache:
            with ThreadPoolExecutor() as pool:
                self.cache = dict(enumerate(pool.map(self._decode, self.files)))

    @staticmethod
    def _decode(paths: list[Path]) -> list[np.ndarray | None]:
        decoded: list[np.ndarray | None] = []
        for path in paths:
            try:
                decoded.append(np.asarray(read_png(path)))
            except READ_ERRORS:
                decoded.append(None)  # the error comes again when the picture is drawn
        return decoded

    def symmetries_of(self, shape: int) -> list[int]:
        """The symmetries in which `draw` may give a shape."""
        return np.flatnonzero(self.turns.symmetries(shape, shape + 1)[0]).tolist()

    def draw_view(self, shape: int, mirrored: int, rng: np.random.Generator, augment: bool = True) -> "Drawn":
        """Draw a view of a shape, and its augmentation if these views and this call want one."""
        view = int(rng.integers(int(self.first[shape + 1] - self.first[shape])))
        return Drawn(shape, view, mirrored, Change.draw(rng) if self.augment and augment else None)

    def draw(self, shapes: np.ndarray, mirrored: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """Draw a picture of each shape (B,), mirrored (B,) or not.

        Returns:
            The symmetries (B,) int64 that the pictures show, and the pictures (B, 4, S, S) uint8: RGB and mask.
        """
        pairs = zip(shapes.tolist(), mirrored.tolist(), strict=True)
        drawn = [self.draw_view(*pair, rng) for pair in pairs]
        symmetries, pictures = zip(*map(self.picture, drawn), strict=True)
        return np.array(symmetries), torch.stack(pictures)

    def picture(self, drawn: "Drawn") -> tuple[int, Tensor]:
        """Return the symmetry that a view shows, and its picture (4, S, S) uint8.

        They are those of the shape's next view where the picture is damaged.

        Raises:
            DamagedFileError: no picture of the shape can be read.
            TooManyDamagedError: too many pictures are damaged.
        """
        shape, _, flip, change = drawn

        def read(view: int) -> tuple[int, Tensor]:
            picture = self.damaged.read(self.number(shape, view), lambda: self._picture(shape, view, flip, change))
            return self.symmetry(shape, view, flip), picture

        return first_readable(self.following(shape, drawn.view), read)

    def number(self, shape: int, view: int) -> int:
        """The number of a picture among all."""
        return int(self.first[shape]) + view

    def symmetry(self, shape: int, view: int, flip: int) -> int:
        """The symmetry of a shape that a picture, flipped or not, shows."""
        return self.turns[shape][view] + MIRROR * flip

    def following(self, shape: int, view: int) -> Iterator[int]:
        """Yield all views of a shape, from a view on."""
        number = int(self.first[shape + 1] - self.first[shape])
        return ((view + i) % number for i in range(number))

    def _picture(self, shape: int, view: int, flip: bool, change: "Change | None") -> Tensor:
        cached = self.cache[shape][view] if shape in self.cache else None
        image = read_png(self.files[shape][view]) if cached is None else Image.fromarray(cached)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        margin = MARGIN  # as at inference
        if change is not None:
            image, margin = rotate_and_crop(image, change), change.margin
        return (preprocess(image, self.image_size, margin) * 255).round().byte()


class Drawn(NamedTuple):
    """A view that was drawn for a sample."""

    shape: int  # index into Views.names
    view: int
    flip: int  # whether the picture is flipped, since the shape is mirrored
    change: "Change | None"


class Change(NamedTuple):
    """How a picture is augmented."""

    rotation: float | None  # degrees
    crop: tuple[float, float, float, float] | None  # width and height as fractions; place in what is left, in [0, 1)
    margin: float  # pixels of 518

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Change":
        """Rotate with probability 0.1, and crop with probability 0.1."""
        rotation = rng.uniform(-MAX_ROTATION, MAX_ROTATION) if rng.random() < ROTATE_PROBABILITY else None
        crop = None
        if rng.random() < CROP_PROBABILITY:
            crop = rng.uniform(MIN_CROP, 1), rng.uniform(MIN_CROP, 1), rng.random(), rng.random()
        return cls(rotation, crop, rng.uniform(0, MAX_MARGIN))


def rotate_and_crop(image: Image.Image, change: Change) -> Image.Image:
    """Rotate a picture, then crop it to a part of its object."""
    if change.rotation is not None:
        image = image.rotate(change.rotation, Image.Resampling.BILINEAR, expand=True)
    if change.crop is not None:
        left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
        width, height = (right - left) * change.crop[0], (bottom - top) * change.crop[1]
        x = left + (right - width - left) * change.crop[2]
        y = top + (bottom - height - top) * change.crop[3]
        image = image.crop((round(x), round(y), round(x + width), round(y + height)))
    return image


# --- chosen views, without augmentation


class View(NamedTuple):
    """One picture, and the symmetry of the shape that it shows."""

    shape: int  # index into Views.names
    view: int  # index into Views.files[shape]
    symmetry: int


class Pictures(Dataset):
    """Chosen pictures as at inference, in batches: `pictures[i]` is (B, 4, S, S) uint8, B at most `batch_size`."""

    def __init__(self, views: Views, chosen: list[View], batch_size: int):
        self.views, self.chosen, self.batch_size = views, chosen, batch_size

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def __getitem__(self, index: int) -> Tensor:
        batch = self.chosen[index * self.batch_size : (index + 1) * self.batch_size]
        return torch.stack([self._picture(view) for view in batch])

    def _picture(self, view: View) -> Tensor:
        image = read_png(self.views.files[view.shape][view.view])
        return (preprocess(image, self.views.image_size) * 255).round().byte()


def choose_views(views: Views, number: int, seed: int) -> list[View]:
    """Draw `number` views of each shape, all if it has fewer; the draw follows from the seed and the shape's name."""
    chosen = []
    for shape, name in enumerate(views.names):
        rng = np.random.default_rng([seed, *name.encode()])
        drawn = sorted(rng.permutation(len(views.files[shape]))[:number].tolist())
        chosen.extend(View(shape, view, views.turns[shape][view]) for view in drawn)
    return chosen
