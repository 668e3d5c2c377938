"""Pictures that are rendered on the training device when they are needed, so that none comes twice.

Networks learn a few pictures of each shape by heart. Here each sample is seen from a new camera, in a new light, and
those without colours in a new colour. The shapes are `surfels`, which stay on the device. Cameras stand in front, as
those of `render_views` do after the turn to the camera (see `symmetry`): each shape has four sides, and their mirror
images.

Sizes: n shapes, P points of each, B pictures of a batch, S pixels per edge, E = S/4 cells per edge of a point map.
"""

import colorsys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.images.srgb import to_linear
from d3ds2.kernels.device_constant import device_constant
from d3ds2.kernels.devices import free_memory, without_autocast
from training.data.cameras import Turns
from training.data.damaged_files import READ_ERRORS, DamagedFiles
from training.data.datasets import Choice
from training.data.device_pictures import CELL, MATRICES, PictureBatch, augmented
from training.data.held import GIB
from training.data.surfel_rendering import Shots, look, shade
from training.data.surfels import NORMAL_STEPS, POINT_STEPS, Surfels, read_surfels, surfels_path
from training.data.view_ranges import GAMMA, RANGE, check_view_ranges
from training.data.views import Views
from training.losses import DrawRows, draw_all

BYTES = 12  # of a surfel on the device
SIDES = 4  # of a shape, from which the camera stands within 45°
FINER = 8 / 7  # pixels rendered along an edge, by those wanted
READ_AT_ONCE = 256  # files
RENDERED_AT_ONCE = 64  # pictures
HUES = 256  # colours of meshes without any
DRAWS = 24  # random numbers of a picture


@dataclass(frozen=True)
class RenderedPicturesConfig:
    """Ranges of cameras and lights, as in `render_views`; the defaults are those of tiny_views.toml. [D]"""

    elevation: RANGE = (-10.0, 60.0)  # degrees
    focal_mm: RANGE = (28.0, 110.0)  # for a sensor of 36 mm
    light_elevation: RANGE = (5.0, 85.0)  # degrees, of the key light
    light_azimuth: RANGE = (-110.0, 110.0)  # degrees from the camera's
    light_key: RANGE = (0.35, 1.0)  # intensity of the key light; 1: a white face toward it is white
    light_fill: RANGE = (0.03, 0.25)  # of the light at the camera
    light_sky: RANGE = (0.15, 0.5)  # of the ambient light from above
    light_ground: RANGE = (0.05, 0.25)  # of the ambient light from below
    light_tint: float = 0.12  # largest relative change of a colour channel of the key light, and of all other light
    shadows: float = 0.5  # probability that the key light casts shadows
    color_jitter: float = 0.15  # largest relative change of a colour channel

    def __post_init__(self):
        check_view_ranges(self, "rendered.")


def check_rendered(rendered: RenderedPicturesConfig | None, turn_to_camera: bool) -> None:
    """Check that shapes are turned to the camera if pictures are rendered. Raises ValueError if they are not."""
    if rendered is not None and not turn_to_camera:
        raise ValueError("rendered needs turn_to_camera, got false")


class SidesOfShapes(Views):
    """The four sides of shapes with surfels, in place of pictures in files: `view` is the side.

    Args:
        data_dir: holds surfels/ of sample_surfels.
        names: the shapes wanted. The attribute `names` lists those that have surfels; the others are left out.
        image_size: pixels per edge, S.

    Raises:
        FileNotFoundError: none of the shapes has surfels.
    """

    def __init__(self, data_dir: str, names: list[str], image_size: int):
        self.data_dir, self.image_size, self.augment, self.cache = data_dir, image_size, True, {}
        self.names = [name for name in names if surfels_path(data_dir, name).is_file()]
        if not self.names:
            raise FileNotFoundError(
                f"expected surfels in {data_dir}/surfels; make them with python -m training.sample_surfels"
            )
        n = len(self.names)
        self.first = SIDES * np.arange(n + 1)
        self.turns = Turns(np.tile(np.arange(SIDES, dtype=np.uint8), n), self.first)
        self.damaged = DamagedFiles(n, "sample_surfels", SIDES)


def load_views(
    data_dir: str,
    names: list[str],
    image_size: int,
    turn_to_camera: bool,
    cache: bool,
    rendered: RenderedPicturesConfig | None,
) -> Views:
    """Return the pictures of the named shapes, or their sides, where pictures are rendered.

    Raises as `Views` or `SidesOfShapes`, whose arguments these are.
    """
    if rendered is not None:
        return SidesOfShapes(data_dir, names, image_size)
    return Views(data_dir, names, image_size, turn_to_camera, cache=cache)


def check_memory(shapes: int, points: int, device: torch.device) -> None:
    """Check that the surfels of so many shapes fit on a GPU. Raises ValueError if they do not."""
    needed, free = shapes * points * BYTES, free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"expected {needed / GIB:.1f} GiB free on {device} for {shapes} shapes of {points} surfels, got "
            f"{free / GIB:.1f}: sample fewer with a smaller number, or train on fewer shapes"
        )


class RenderedPictures:
    """Pictures of shapes, rendered when they are drawn. The surfels of all shapes are on the device, BYTES each.

    Raises:
        ValueError: the files differ in their number of points, or do not fit on the device.
        TooManyDamagedError: too many files are damaged.
    """

    def __init__(self, views: SidesOfShapes, config: RenderedPicturesConfig, device: torch.device):
        self.config, self.size = config, views.image_size
        self.linear = torch.from_numpy(to_linear(np.arange(256, dtype=np.uint8))).to(device)  # of sRGB bytes
        hues = np.array([colorsys.hsv_to_rgb(hue / HUES, 1, 1) for hue in range(HUES)], np.float32)
        self.hues = torch.from_numpy(hues).to(device)
        n, self.points = len(views.names), torch.zeros(0)
        self.is_colored = torch.zeros(n, dtype=torch.bool)
        for shape, surfels in self._read(views):
            number = len(surfels.points)
            if not len(self.points):
                check_memory(n, number, device)
                self.points = torch.zeros((n, number, 3), dtype=torch.int16, device=device)
                self.normals = torch.zeros((n, number, 3), dtype=torch.int8, device=device)
                self.colors = torch.zeros((n, number, 3), dtype=torch.uint8, device=device)
            if number != self.points.shape[1]:
                path = surfels_path(views.data_dir, views.names[shape])
                raise ValueError(f"expected {self.points.shape[1]} points as in other files, got {number} in {path}")
            self.points[shape] = torch.from_numpy(surfels.points)
            self.normals[shape] = torch.from_numpy(surfels.normals)
            self.is_colored[shape] = len(surfels.colors) > 0
            if len(surfels.colors):
                self.colors[shape] = torch.from_numpy(surfels.colors)
        self.is_colored = self.is_colored.to(device)

    @staticmethod
    def _read(views: SidesOfShapes) -> Iterator[tuple[int, Surfels]]:
        """Yield the shapes whose surfels can be read; a damaged file is noted for all sides."""

        def read(shape: int) -> Surfels | None:
            path = surfels_path(views.data_dir, views.names[shape])
            try:
                return views.damaged.read(SIDES * shape, lambda: read_surfels(path))
            except READ_ERRORS:
                views.damaged.flags[shape] = True
                return None

        n = len(views.names)
        with ThreadPoolExecutor() as pool:
            for first in range(0, n, READ_AT_ONCE):  # not all at once: the host may have less memory than the device
                shapes = range(first, min(first + READ_AT_ONCE, n))
                for shape, surfels in zip(shapes, pool.map(read, shapes), strict=True):
                    if surfels is not None:
                        yield shape, surfels

    @torch.no_grad()
    def draw(
        self,
        choice: Choice,
        generator: torch.Generator,
        augment: bool = True,
        draw_samples: DrawRows = draw_all,
    ) -> PictureBatch:
        """Render the chosen sides, each in a new way; augment as `DevicePictures.draw`, which returns the same."""
        device = self.points.device

        def uniform(B: int) -> Tensor:
            return torch.rand((B, DRAWS), generator=generator, device=generator.device)

        u = draw_samples(len(choice.shapes), uniform).to(device)
        parts = zip(*(column.split(RENDERED_AT_ONCE) for column in (choice.shapes, choice.symmetries, u)), strict=True)
        with without_autocast(device):  # half precision moves points by pixels
            images, points = map(torch.cat, zip(*(self._render(*part) for part in parts), strict=True))
        pictures = PictureBatch(images, points)
        return augmented(pictures, generator, draw_samples) if augment else pictures

    def _render(self, shapes: Tensor, symmetries: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Render shapes (b,) in symmetries (b,) by random numbers (b, DRAWS): (b, 4, S, S) and (b, 4, E, E)."""
        shots, gain, paint = self._shots(u)
        matrix = device_constant(MATRICES, u.device, torch.float32).unflatten(1, (3, 3))[symmetries].transpose(1, 2)
        points = self.points[shapes].float() @ matrix / POINT_STEPS
        edge = round(self.size * FINER)
        seen = look(points, shots, edge)
        rows = shapes[:, None] * self.points.shape[1] + seen.point
        normals = self.normals.flatten(0, 1)[rows].float() @ matrix / NORMAL_STEPS
        own = self.linear[self.colors.flatten(0, 1)[rows].int()] * gain[:, None]
        colors = torch.where(self.is_colored[shapes][:, None, None], own, paint[:, None])
        images = shade(seen, normals, colors, points, shots)
        size, cells = (self.size, self.size), (self.size // CELL, self.size // CELL)
        rgb = F.interpolate(images[:, :3], size, mode="bilinear", antialias=True, align_corners=False)
        mask = F.interpolate(images[:, 3:], size, mode="nearest-exact")
        xyz = seen.xyz.transpose(1, 2).unflatten(2, (edge, edge))
        point_map = F.interpolate(torch.cat([xyz, images[:, 3:]], dim=1), cells, mode="nearest-exact")
        return torch.cat([rgb, mask], dim=1).clamp(0, 1), point_map

    def _shots(self, u: Tensor) -> tuple[Shots, Tensor, Tensor]:
        """Return cameras and lights, a linear gain (b, 3) of own colours, and a linear colour (b, 3) in their place."""
        config, columns = self.config, iter(u.unbind(1))

        def between(limits: RANGE) -> Tensor:
            return limits[0] + (limits[1] - limits[0]) * next(columns)

        def change(width: float) -> Tensor:
            return torch.stack([between((1 - width, 1 + width)) for _ in range(3)], dim=1)

        azimuth = between((-45.0, 45.0))
        shots = Shots(
            elevation=between(config.elevation),
            azimuth=azimuth,
            focal_mm=between(config.focal_mm),
            light_elevation=between(config.light_elevation),
            light_azimuth=azimuth + between(config.light_azimuth),
            key=between(config.light_key),
            fill=between(config.light_fill),
            sky=between(config.light_sky),
            ground=between(config.light_ground),
            shadows=next(columns) < config.shadows,
            key_color=change(config.light_tint),
            ambient_color=change(config.light_tint),
        )
        gain = change(config.color_jitter) ** GAMMA
        hue = self.hues[(next(columns) * HUES).int().clamp(max=HUES - 1)]
        saturation = 1 - (1 - next(columns)) ** 0.4  # as beta(1, 2.5): mostly muted, like paint, wood and stone
        value = between((0.35, 0.95))
        srgb = value[:, None] * (1 - saturation[:, None] * (1 - hue))
        return shots, gain, self.linear[(srgb * 255).round().int()]
