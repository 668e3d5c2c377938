"""Draw occupied voxels from the front, the right and above: a preview of a structure while it is sampled.

In parallel projection all cubes look alike, so one cube is drawn and stamped for every voxel, the farthest first. This
takes some milliseconds.

Sizes:
    N  voxels     R  voxels per edge of the cube     P  pixels of one voxel's stamp
"""

import numpy as np
from PIL import Image

BACKGROUND = (24, 26, 30)
COLOR = (0.82, 0.84, 0.88)  # of all voxels where no colours are given
FACE_SHADES = np.array([0.78, 1.0, 0.52], np.float32)  # of the front (+Z), top (+Y) and right (+X) face
AZIMUTH, ELEVATION = np.radians(30.0), np.radians(25.0)
RIGHT = np.array([np.cos(AZIMUTH), 0.0, -np.sin(AZIMUTH)])
TOWARD = np.array([np.sin(AZIMUTH) * np.cos(ELEVATION), np.sin(ELEVATION), np.cos(AZIMUTH) * np.cos(ELEVATION)])
UP = np.cross(TOWARD, RIGHT)


def voxel_picture(
    coords: np.ndarray, resolution: int, size: int = 320, colors: np.ndarray | None = None
) -> Image.Image:
    """Draw voxels as shaded cubes, Y up, the front (+Z) to the left; nearer ones are lighter.

    Args:
        coords: (N, 3) integers in [0, R); without any the picture is empty.
        resolution: R.
        size: pixels of the picture's edge.
        colors: (N, 3) in [0, 1]; default: grey.

    Returns:
        An RGB picture that shows the whole cube [0, R)³.
    """
    picture = np.empty((size * size, 3), np.uint8)
    picture[:] = BACKGROUND
    coords = np.asarray(coords, np.float64).reshape(-1, 3)
    if len(coords):
        scale = size / (1.56 * resolution)  # pixels per voxel: the cube is 1.37 R wide and 1.49 R high from here
        depth = coords @ TOWARD
        order = np.argsort(depth, kind="stable")
        centres = (coords[order] + 0.5 - resolution / 2) @ np.stack([RIGHT, -UP], 1) * scale + size / 2  # (N, 2)
        offsets, shades = _stamp(scale)  # (P, 2), (P,)
        pixels = np.floor(centres[:, None] + offsets).astype(np.int64).clip(0, size - 1)  # (N, P, 2) column, row

        base = np.broadcast_to(COLOR, (len(coords), 3)) if colors is None else np.asarray(colors)[order]
        light = 0.6 + 0.4 * (depth[order] - depth.min()) / max(np.ptp(depth), 1.0)
        values = (255 * light[:, None, None] * base[:, None] * shades[:, None]).clip(0, 255).astype(np.uint8)
        picture[pixels[..., 1].ravel() * size + pixels[..., 0].ravel()] = values.reshape(-1, 3)  # the last write stays
    return Image.fromarray(picture.reshape(size, size, 3))


def latent_colors(latents: np.ndarray) -> np.ndarray:
    """Turn normalised latents (N, E) into colours (N, 3) in [0, 1]: the first three channels, around grey."""
    return np.clip(0.55 + 0.22 * np.asarray(latents, np.float32)[:, :3], 0.0, 1.0)


def _stamp(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels (P, 2) of a cube from its centre, columns and rows, and the shades (P,) of their faces."""
    reach = int(np.ceil(scale * np.sqrt(3.0) / 2)) + 1
    axis = np.arange(-reach, reach + 1) * 1.0
    offsets = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)  # pixel centres
    normals = np.eye(3)[[2, 1, 0]]  # front, top, right
    origin = offsets[:, :1] / scale * RIGHT - offsets[:, 1:] / scale * UP  # (P, 3), on the plane through the centre
    # a ray from the plane toward the camera leaves the cube through the nearest of the three visible faces
    distance = (0.5 - origin @ normals.T) / (TOWARD @ normals.T)  # (P, 3)
    face = distance.argmin(1)
    hit = origin + distance.min(1)[:, None] * TOWARD
    inside = (np.abs(hit) <= 0.5 + 1e-9).all(1)
    if not inside.any():  # a voxel smaller than a pixel
        return np.zeros((1, 2)), FACE_SHADES[:1]
    return offsets[inside], FACE_SHADES[face[inside]]
