"""Colours that vary within the faces of a mesh: colours of corners, and textures.

A texture repeats beyond [0, 1], as in glTF. It is kept in smaller and smaller copies. A point is read, bilinearly, from
the copy whose texels are about as large as a pixel of the picture, so that a distant texture does not flicker.

Sizes:
    F  faces     n  points     H, W  texels of a texture
"""

import numpy as np
from PIL import Image

from .srgb import to_linear

PLAIN = -1  # the texture of a face without one
MOST_LEVELS = 16


class SurfaceColors:
    """The colour of each point of a mesh: that of the face's corners, times the texture's if the face has one.

    Args:
        corners: (F,3,3) uint8 sRGB, the colours at the corners of each face.
        uv: (F,3,2) float32, the place of each corner in its texture: (0, 0) is the lower left, (1, 1) the upper right.
        texture: (F,) integers, the number of each face's texture, or `PLAIN`.
        pictures: the textures. Their alpha is not read.

    Raises:
        ValueError: the shapes do not belong together.
    """

    def __init__(self, corners, uv=None, texture=None, pictures: list[Image.Image] | None = None):
        self.corners = np.asarray(corners, dtype=np.uint8)
        number = len(self.corners)
        self.uv = np.zeros((number, 3, 2), np.float32) if uv is None else np.asarray(uv, dtype=np.float32)
        self.texture = np.full(number, PLAIN) if texture is None else np.asarray(texture)
        self.is_flat = bool((self.corners == self.corners[:, :1]).all())  # apart from textures
        self.pyramids = [_pyramid(picture) for picture in pictures or []]
        shapes = self.corners.shape, self.uv.shape, self.texture.shape
        if shapes != ((number, 3, 3), (number, 3, 2), (number,)):
            raise ValueError(f"expected colours (F,3,3), uv (F,3,2) and textures (F,), got {shapes}")
        if number and not PLAIN <= self.texture.min() <= self.texture.max() < len(self.pyramids):
            raise ValueError(f"expected {len(self.pyramids)} textures, got the number {self.texture.max()}")
        if not np.isfinite(self.uv).all():
            raise ValueError("expected finite uv, got NaN or infinity")

    def texels(self, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
        """Return how many texels lie along a unit of length on each face, (F,) float32; 0 without a texture."""
        a, b, c = (vertices[faces[:, k]] for k in range(3))
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
        one, two = (self.uv[:, 1:] - self.uv[:, :1]).transpose(1, 2, 0)  # (2, F) each: the edges from the first corner
        share = np.abs(one[0] * two[1] - one[1] * two[0])
        sizes = np.array([*(pyramid[0].shape[0] * pyramid[0].shape[1] for pyramid in self.pyramids), 0])
        return np.sqrt(share * sizes[self.texture] / np.maximum(area, 1e-20)).astype(np.float32)

    def linear(self, face: np.ndarray, u: np.ndarray, v: np.ndarray, texels: np.ndarray) -> np.ndarray:
        """Return linear colours (n,3) float32 at points of faces.

        Args:
            face: (n,) integers.
            u, v: (n,) barycentric coordinates of the second and third corner.
            texels: (n,) how many texels a pixel of the picture is wide, there.
        """
        weights = np.stack([1 - u - v, u, v], axis=1).astype(np.float32)
        if self.is_flat:
            color = to_linear(self.corners[face, 0])
        else:
            color = np.einsum("nk,nkc->nc", weights, to_linear(self.corners[face]))
        texture = self.texture[face]
        textured = np.flatnonzero(texture != PLAIN)
        if len(textured) == 0:
            return color
        places = np.einsum("nk,nkc->nc", weights[textured], self.uv[face[textured]])
        level = np.log2(np.maximum(texels[textured], 1)).round().astype(np.int64)
        depth = np.array([len(pyramid) for pyramid in self.pyramids])[texture[textured]]
        key = texture[textured] * MOST_LEVELS + np.minimum(level, depth - 1)
        for wanted in np.unique(key):
            here = np.flatnonzero(key == wanted)
            picture = self.pyramids[wanted // MOST_LEVELS][wanted % MOST_LEVELS]
            color[textured[here]] *= _bilinear(picture, places[here])
        return color


def _pyramid(picture: Image.Image) -> list[np.ndarray]:
    """Return a picture and its copies of half, a quarter, ... of its size: (H,W,3) uint8 each."""
    picture, levels = picture.convert("RGB"), []
    while True:
        levels.append(np.asarray(picture))
        if min(picture.size) == 1 or len(levels) == MOST_LEVELS:
            return levels
        picture = picture.reduce(2)


def _bilinear(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return linear colours (n,3) float32 of a picture (H,W,3) at places (n,2), each mixed from four texels."""
    height, width = picture.shape[:2]
    places = places - np.floor(places)
    x = places[:, 0] * np.float32(width) - np.float32(0.5)
    y = (1 - places[:, 1]) * np.float32(height) - np.float32(0.5)
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across, down = (x - left)[:, None], (y - top)[:, None]
    texels, right, bottom = picture.reshape(-1, 3), (left + 1) % width, (top + 1) % height * width
    left, top = left % width, top % height * width
    upper = to_linear(texels[top + left]) * (1 - across) + to_linear(texels[top + right]) * across
    lower = to_linear(texels[bottom + left]) * (1 - across) + to_linear(texels[bottom + right]) * across
    return (upper * (1 - down) + lower * down).astype(np.float32)
