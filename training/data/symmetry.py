"""The eight symmetries of the upright cube: quarter turns about Y, and a mirror across x = 0.

A picture does not say which side of an object its maker called the front, so a model that must guess it from one view
is punished for guessing. Here the front is what the camera sees: a shape is turned by quarter turns until the camera
stands within 45° of +Z. Every view of every azimuth then has one right answer, and one shape gives four. A mirrored
shape with the flipped picture is a further pair, eight in all.

A symmetry is an int: `quarter_turns + 4 * mirrored`; turns come first. Grids are indexed [x, y, z].
"""

import numpy as np

NUM_SYMMETRIES = 8


def facing(azimuth: float) -> tuple[int, float]:
    """The symmetry that brings a camera at `azimuth` degrees (0 is +Z, 90 is +X) to the front, and its new azimuth."""
    turns = round(azimuth / 90)
    return turns % 4, azimuth - 90 * turns


def transform_voxels(xyz: np.ndarray, resolution: int, symmetry: int) -> np.ndarray:
    """Voxel coordinates (N, 3) of any integer dtype, moved."""
    x, y, z = xyz.T
    for _ in range(_turns(symmetry)):
        x, z = resolution - 1 - z, x
    if symmetry >= 4:
        x = resolution - 1 - x
    return np.stack([x, y, z], axis=1)


def transform_grid(grid: np.ndarray, symmetry: int) -> np.ndarray:
    """Grids (..., X, Y, Z), cubic, as a view: the value at voxel p moves to `transform_voxels(p)`."""
    grid = np.rot90(grid, _turns(symmetry), axes=(-3, -1))
    return grid[..., ::-1, :, :] if symmetry >= 4 else grid


def transform_vertices(vertices: np.ndarray, symmetry: int) -> np.ndarray:
    """Points (N, 3) around the origin, moved. A mirror turns faces inside out: reverse them where `symmetry >= 4`."""
    x, y, z = vertices.T
    for _ in range(_turns(symmetry)):
        x, z = -z, x
    return np.stack([-x if symmetry >= 4 else x, y, z], axis=1)


def inverse(symmetry: int) -> int:
    """The symmetry that undoes another: a turn is turned back, and every mirror undoes itself."""
    return symmetry if symmetry >= 4 else -_turns(symmetry) % 4


def _turns(symmetry: int) -> int:
    if not 0 <= symmetry < NUM_SYMMETRIES:
        raise ValueError(f"expected a symmetry of 0 to 7, got {symmetry}")
    return symmetry % 4
