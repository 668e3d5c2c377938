"""Rendered views as the image encoder reads them, with the augmentation of the paper.

A shape is turned by quarter turns until the camera of its picture stands in front of it (`symmetry`), or left
as it is (`turn_to_camera` false, as in the paper). Each picture is rotated by up to 10° (p 0.1), cropped to 0.9-1 of
its edges (p 0.1), cropped to the object, and put on white in a square with a margin of 0-32 pixels of 518. [B/C]
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d3ds2.images.foreground import MARGIN, preprocess
from training.data.symmetry import facing

ROTATE_PROBABILITY, MAX_ROTATION = 0.1, 10.0  # degrees
CROP_PROBABILITY, MIN_CROP = 0.1, 0.9
MAX_MARGIN = 32  # pixels of 518, as `MARGIN` at inference


class Views:
    """The pictures of some shapes. A mirrored shape's picture is the flipped one.

    Args:
        data_dir: holds views/<name>/*.png (RGBA) and cameras.json of render_views.
        names: shapes wanted. Those without a picture are left out; `names` are the others.
        image_size: pixels per edge S of what `load` returns.
        turn_to_camera: a view's symmetry is that which brings its camera to the front; else only mirrors.
        augment: rotate, crop and vary the margin; else as at inference.
        cache: decode all pictures now and keep them in memory, shared with forked workers.

    Raises:
        FileNotFoundError: none of the shapes has a picture.
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
        folders = {name: Path(data_dir) / "views" / name for name in names}
        self.names = [name for name, folder in folders.items() if (folder / "cameras.json").is_file()]
        if not self.names:
            raise FileNotFoundError(
                f"expected pictures in {data_dir}/views/<name>/; make them with python -m training.render_views"
            )
        self.image_size, self.augment = image_size, augment
        self.files, self.turns = [], []
        for name in self.names:
            views = json.loads((folders[name] / "cameras.json").read_text())["views"]
            self.files.append([folders[name] / view["file"] for view in views])
            azimuths = [view["camera"]["azimuth"] if turn_to_camera else 0.0 for view in views]
            self.turns.append([facing(azimuth)[0] for azimuth in azimuths])
        self.cache = {}
        if cache:
            with ThreadPoolExecutor() as pool:
                self.cache = dict(enumerate(pool.map(self._decode, self.files)))

    @staticmethod
    def _decode(paths: list[Path]) -> list[np.ndarray]:
        return [np.asarray(Image.open(path).convert("RGBA")) for path in paths]

    def symmetries_of(self, shape: int) -> list[int]:
        """The symmetries in which `draw` may give a shape."""
        return sorted({turns + 4 * mirrored for turns in self.turns[shape] for mirrored in (0, 1)})

    def choose(self, shape: int, mirrored: int, rng: np.random.Generator) -> tuple[int, int]:
        """The number of a random view of a shape, and the symmetry in which its picture, mirrored or not, shows it."""
        view = int(rng.integers(len(self.files[shape])))
        return view, self.turns[shape][view] + 4 * mirrored

    def draw(self, shapes: np.ndarray, mirrored: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """A random picture of each shape (B,), mirrored or not (B,).

        Returns:
            The symmetry of each shape (B,) int64, and pictures (B, 4, S, S) uint8: red, green, blue, mask.
        """
        symmetries, pictures = [], []
        for shape, flip in zip(shapes.tolist(), mirrored.tolist(), strict=True):
            view, symmetry = self.choose(shape, flip, rng)
            symmetries.append(symmetry)
            pictures.append(self._picture(shape, view, flip, rng))
        return np.array(symmetries), torch.stack(pictures)

    def _picture(self, shape: int, view: int, flip: bool, rng: np.random.Generator) -> Tensor:
        if shape in self.cache:
            image = Image.fromarray(self.cache[shape][view])
        else:
            image = Image.open(self.files[shape][view]).convert("RGBA")
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        margin = MARGIN  # as at inference
        if self.augment:
            image, margin = rotate_and_crop(image, rng), rng.uniform(0, MAX_MARGIN)
        return (preprocess(image, self.image_size, margin) * 255).round().byte()


def rotate_and_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rotated with probability 0.1, then cropped with probability 0.1."""
    if rng.random() < ROTATE_PROBABILITY:
        image = image.rotate(rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < CROP_PROBABILITY:
        left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
        width, height = ((right - left) * rng.uniform(MIN_CROP, 1), (bottom - top) * rng.uniform(MIN_CROP, 1))
        x, y = rng.uniform(left, right - width), rng.uniform(top, bottom - height)
        image = image.crop((round(x), round(y), round(x + width), round(y + height)))
    return image
