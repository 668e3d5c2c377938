"""Rendered views as the image encoder reads them, with the augmentation of the paper.

A shape is turned by quarter turns until the camera of its picture stands in front of it (see `symmetry`); with
`turn_to_camera` false, as in the paper, it is not turned. Each picture is rotated by up to 10° with probability 0.1,
cropped to 0.9-1 of its edges with probability 0.1, cropped to the object, and put on a white square with a margin of
0-32 pixels of 518. [B/C: see docs/paper.md]

Sizes: B pictures, S pixels per edge.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from d3ds2.images.foreground import MARGIN, preprocess
from training.data.damaged_files import READ_ERRORS, DamagedFiles
from training.data.png_files import read_png
from training.data.shape_files import DamagedFileError, view_folder
from training.data.symmetry import MIRROR, facing

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
        damaged, known = DamagedFiles(len(names), "render_views"), {}
        for place, name in enumerate(names):
            file = view_folder(data_dir, name) / "cameras.json"
            if file.is_file():
                try:
                    known[name] = _read_cameras(file)
                except DamagedFileError as error:
                    damaged.add(place, error)
        self.names = list(known)
        if not self.names:
            raise FileNotFoundError(
                f"expected pictures in {data_dir}/views/<name>/; make them with python -m training.render_views"
            )
        self.image_size, self.augment = image_size, augment
        self.files, self.turns = [], []
        for name, azimuth_of in known.items():
            self.files.append([view_folder(data_dir, name) / file for file in azimuth_of])
            self.turns.append([facing(azimuth if turn_to_camera else 0.0)[0] for azimuth in azimuth_of.values()])
        self.first = np.cumsum([0, *map(len, self.files)])  # the number of each shape's first picture, among all
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
        return sorted({turns + MIRROR * mirrored for turns in self.turns[shape] for mirrored in (0, 1)})

    def choose(self, shape: int, mirrored: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a view of a shape; return its number, and the symmetry of the shape that its picture shows."""
        view = int(rng.integers(len(self.files[shape])))
        return view, self.turns[shape][view] + MIRROR * mirrored

    def draw(
        self,
        shapes: np.ndarray,
        mirrored: np.ndarray,
        rng: np.random.Generator,
        chosen: np.ndarray | slice = slice(None),
    ) -> tuple[np.ndarray, Tensor]:
        """Draw a picture of each shape (B,), mirrored (B,) or not. Only `chosen` ones are made, as among all.

        Returns:
            The symmetries (b,) int64 that the pictures show, and the pictures (b, 4, S, S) uint8: RGB and mask.
        """
        drawn = []
        for shape, flip in zip(shapes.tolist(), mirrored.tolist(), strict=True):
            view, _ = self.choose(shape, flip, rng)
            drawn.append((shape, view, flip, Change.draw(rng) if self.augment else None))
        symmetries, pictures = zip(*(self._readable(*drawn[i]) for i in np.arange(len(drawn))[chosen]), strict=True)
        return np.array(symmetries), torch.stack(pictures)

    def _readable(self, shape: int, view: int, flip: bool, change: "Change | None") -> tuple[int, Tensor]:
        """Return a view's symmetry and picture; those of the shape's next view where the picture is damaged."""
        first, number = int(self.first[shape]), len(self.files[shape])

        def read(picture: int) -> tuple[int, Tensor]:
            view = picture - first
            return self.turns[shape][view] + MIRROR * flip, self._picture(shape, view, flip, change)

        others = (first + (view + i) % number for i in range(1, number))
        return self.damaged.read(first + view, others, read)

    def _picture(self, shape: int, view: int, flip: bool, change: "Change | None") -> Tensor:
        cached = self.cache[shape][view] if shape in self.cache else None
        image = read_png(self.files[shape][view]) if cached is None else Image.fromarray(cached)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        margin = MARGIN  # as at inference
        if change is not None:
            image, margin = rotate_and_crop(image, change), change.margin
        return (preprocess(image, self.image_size, margin) * 255).round().byte()


def _read_cameras(file: Path) -> dict[str, float]:
    """Read the azimuth of each picture in cameras.json, by the picture's file name."""
    try:
        return {view["file"]: float(view["camera"]["azimuth"]) for view in json.loads(file.read_text())["views"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"damaged file {file} ({error})") from None


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
