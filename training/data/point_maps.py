"""Point maps: where in space each pixel of a view sees its mesh. They teach an image encoder depth, see point_loss.py.

    views/<name>/000_points.png     of the view 000.png: RGBA, the coordinates x, y, z in the cube [-1, 1]³ as
                                    round(255 (x + 1) / 2), and 255 where the pixel's centre sees the mesh, else 0

A step of a coordinate is 1/127.5, a voxel at R = 255. None of it comes from the paper. [D: see docs/paper.md]

Sizes: P pixels per edge of a map, E cells per edge of a map that fits a picture of the encoder.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from training.data.png_files import read_png

LEVELS = 255  # steps from -1 to 1


def point_map_of(picture: Path) -> Path:
    """Return the file of a picture's point map."""
    return picture.with_name(f"{picture.name.removesuffix('.png')}_points.png")  # packed paths have no stem


def encode_points(points: np.ndarray) -> np.ndarray:
    """Encode coordinates (P, P, 3), NaN beside the mesh, as the pixels (P, P, 4) uint8 of a point map."""
    is_seen = np.isfinite(points).all(-1)
    pixels = np.zeros((*is_seen.shape, 4), np.uint8)
    pixels[is_seen, :3] = np.round((points[is_seen].clip(-1, 1) + 1) * (LEVELS / 2))
    pixels[is_seen, 3] = 255
    return pixels


def read_point_map(picture: Image.Image, path: Path, size: int, cells: int) -> np.ndarray:
    """Read a point map as the encoder sees its picture: cut to the object and centred, as `preprocess` does.

    Args:
        picture: the whole view, RGBA.
        path: the view's file; its point map lies beside it.
        size: pixels per edge of the encoder's picture, S.
        cells: E.

    Returns:
        Pixels (E, E, 4) uint8 of the map, each that of the cell's centre; zero beside the object.

    Raises:
        FileNotFoundError: the view has no point map.
        DamagedFileError: the point map is damaged.
    """
    from d3ds2.images.foreground import MARGIN, SIZE, object_box  # imports torch, which render_views does without

    pixels = np.asarray(read_png(point_map_of(path)))
    left, top, right, bottom = object_box(picture)
    edge, margin = max(right - left, bottom - top), round(MARGIN * size / SIZE)
    centres = (
        ((np.arange(cells) + 0.5) / cells * (size + 2 * margin) - margin) / size * edge
    )  # from the square's corner
    columns = left - (edge - (right - left)) // 2 + centres  # (E,) in pixels of the view
    rows = top - (edge - (bottom - top)) // 2 + centres
    P = len(pixels)
    columns, rows = (np.floor(c / picture.width * P).astype(int) for c in (columns, rows))
    inside = ((rows >= 0) & (rows < P))[:, None] & ((columns >= 0) & (columns < P))
    return pixels[rows.clip(0, P - 1)[:, None], columns.clip(0, P - 1)] * inside[..., None].astype(np.uint8)
