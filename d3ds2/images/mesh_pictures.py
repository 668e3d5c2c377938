"""Pictures of a mesh from around it: shaded, its depth, its normals and its mask, as image networks read them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .render import Camera, Light, MeshRenderer

MOST_PIXELS, MOST_SIDES, TURN = 4096, 64, 360  # per edge; of a mesh; degrees
FARTHEST = 0.1  # the depth picture's grey at the farthest point, so that it stands out from the black beside the object
TOWARD_CAMERA = (0.5, 0.5, 1.0)  # the colour of a normal that points at the camera


class MeshPicture(NamedTuple):
    """One view of a mesh; S is the edge in pixels, values are float32 in [0, 1].

    Attributes:
        image: (S, S, 3), sRGB, on white.
        depth: (S, S, 3), 1 at the nearest point and FARTHEST at the farthest, linear in the distance; 0 beside it.
        normals: (S, S, 3), the normal (right, up, toward the camera) from [-1, 1] to [0, 1].
        mask: (S, S), 1 on the object, fractions at its edge.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    mask: np.ndarray


def draw_sides(
    vertices: np.ndarray,
    faces: np.ndarray,
    size: int,
    sides: int = 1,
    azimuth: float = 0.0,
    elevation: float = 15.0,
) -> Iterator[MeshPicture]:
    """Return pictures of a mesh from `sides` equal angles around it, each drawn when it is asked for.

    The light turns with the camera.

    Args:
        vertices: (V, 3), Y up, the front toward +Z.
        faces: (F, 3), wound alike.
        size: pixels per edge.
        azimuth, elevation: of the first camera, in degrees, as in `Camera`.

    Raises:
        ImportError: embreex is not installed.
        ValueError: the size, the sides or an angle is out of range, or the mesh has no faces.
    """
    if not 1 <= size <= MOST_PIXELS or not 1 <= sides <= MOST_SIDES:
        raise ValueError(f"expected 1 to {MOST_SIDES} sides of 1 to {MOST_PIXELS} pixels, got {sides} of {size}")
    if not abs(azimuth) <= TURN or not abs(elevation) <= TURN:
        raise ValueError(f"expected angles up to {TURN} degrees, got {azimuth} and {elevation}")
    return _draw(MeshRenderer(vertices, faces, smooth=True), size, sides, azimuth, elevation)


def _draw(renderer: MeshRenderer, size: int, sides: int, azimuth: float, elevation: float) -> Iterator[MeshPicture]:
    for side in range(sides):
        angle = azimuth + 360 * side / sides
        camera, light = Camera(elevation, angle), Light(azimuth=angle + Light.azimuth, shadows=True)
        shaded = renderer.render(camera, size, light, supersample=2).astype(np.float32) / 255
        mask = shaded[..., 3]
        on_white = shaded[..., :3] * mask[..., None] + (1 - mask[..., None])
        distances, normals = renderer.depth_and_normals(camera, size)
        seen = np.isfinite(distances)
        normals = np.where(seen[..., None], (normals + 1) / 2, np.asarray(TOWARD_CAMERA, np.float32))
        yield MeshPicture(on_white, np.repeat(_grey(distances, seen)[..., None], 3, axis=2), normals, mask)


def _grey(distances: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return distances (S, S) as grey values, where they are `seen` (S, S)."""
    grey = np.zeros(distances.shape, np.float32)
    if seen.any():
        near, far = distances[seen].min(), distances[seen].max()
        grey[seen] = 1 - (1 - FARTHEST) * (distances[seen] - near) / max(far - near, np.float32(1e-12))
    return grey
