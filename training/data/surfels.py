"""Surfels: points of a mesh's surface with normals and colours, from which any view can be rendered on a device.

    surfels/<name>.safetensors    points (P,3) int16, round(32767 x); normals (P,3) int8, round(127 n);
                                  colors (P,3) uint8 sRGB; without colours, (0,3)

The points lie evenly on all triangles. The first few are the mesh's outermost points in `DIRECTIONS`, so that the
bounding box of the points is that of the mesh. Imports no torch. None of it comes from the paper. [D: see
docs/paper.md]

Sizes: V vertices, F faces, P points.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d3ds2.images.srgb import to_bytes
from d3ds2.images.surface_colors import SurfaceColors
from training.data.array_files import DamagedFileError, read_arrays, write_arrays
from training.data.packs import open_data

POINT_STEPS, NORMAL_STEPS = 32767, 127  # of 1
TEXELS_OF = 2 / 224  # width of the area that a point's colour is the mean of, in the cube [-1, 1]³: a pixel's
DIRECTIONS = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if any(d)], np.float32)  # (26, 3)


class Surfels(NamedTuple):
    """Points of a surface in the cube [-1, 1]³."""

    points: np.ndarray  # (P, 3) int16
    normals: np.ndarray  # (P, 3) int8
    colors: np.ndarray  # (P, 3) uint8 sRGB, or (0, 3)


def surfels_path(data_dir: str | Path, name: str) -> Path:
    """The file of a mesh's surfels."""
    return open_data(data_dir) / "surfels" / f"{name}.safetensors"


def write_surfels(path: Path, surfels: Surfels, about: dict[str, Any]) -> None:
    """Write surfels to a file, whole or not at all. Raises OSError if it cannot be written."""
    write_arrays(path, surfels._asdict(), about)


def read_surfels(path: Path) -> Surfels:
    """Read a file of surfels. Raises as `read_arrays`."""
    surfels = Surfels(*read_arrays(path, *Surfels._fields))
    P = len(surfels.points)
    if (
        surfels.points.shape != (P, 3)
        or surfels.normals.shape != (P, 3)
        or surfels.colors.shape not in ((P, 3), (0, 3))
    ):
        raise DamagedFileError(f"damaged file {path} (shapes {[array.shape for array in surfels]})")
    return surfels


def sample_surfels(
    vertices: np.ndarray,
    faces: np.ndarray,
    colors: SurfaceColors | np.ndarray | None,
    number: int,
    rng: np.random.Generator,
) -> Surfels:
    """Draw points evenly from the triangles of a mesh.

    Args:
        vertices: (V,3) in [-1, 1]³.
        faces: (F,3).
        colors: of all points, or of the faces, (F,3) uint8 sRGB; None, or one grey for all faces, is no colour.
        number: P, larger than that of `DIRECTIONS`.

    Raises:
        ValueError: no triangle has an area.
    """
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    cross = np.cross(b - a, c - a)
    double_area = np.linalg.norm(cross, axis=1)
    ends = np.cumsum(double_area)
    if not ends[-1] > 0:
        raise ValueError("expected triangles with an area, got none")
    places = (np.arange(number) + rng.random(number)) / number * ends[-1]  # one in each of equal parts of the area
    face = np.searchsorted(ends, places, side="right").clip(max=len(faces) - 1)
    u, v = rng.random((2, number))
    outside = u + v > 1
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)

    corner = faces.ravel()  # the outermost points are corners of faces
    outermost = (vertices[corner] @ DIRECTIONS.T).argmax(0)  # (26,)
    first = slice(len(DIRECTIONS))
    face[first] = outermost // 3
    u[first], v[first] = outermost % 3 == 1, outermost % 3 == 2

    points = a[face] + u[:, None] * (b - a)[face] + v[:, None] * (c - a)[face]
    normals = cross[face] / np.maximum(double_area[face], 1e-30)[:, None]
    return Surfels(
        np.round(points.clip(-1, 1) * POINT_STEPS).astype(np.int16),
        np.round(normals * NORMAL_STEPS).astype(np.int8),
        _colors_at(vertices, faces, colors, face, u, v),
    )


def is_colored(colors: SurfaceColors | np.ndarray | None) -> bool:
    """Whether a mesh has colours. The same grey of all faces (F,3) counts as none."""
    if colors is None or isinstance(colors, SurfaceColors):
        return colors is not None
    return bool(np.ptp(colors, axis=0).any() or np.ptp(colors[0]) > 8)


def _colors_at(vertices, faces, colors, face: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the colours (P,3) uint8 of points of faces; (0,3) without any."""
    if not is_colored(colors):
        return np.zeros((0, 3), np.uint8)
    if not isinstance(colors, SurfaceColors):
        return colors[face]
    texels = colors.texels(vertices, faces)[face] * TEXELS_OF
    return to_bytes(colors.linear(face, u, v, texels).clip(0, 1))
