"""The eight symmetries of the upright cube: quarter turns about Y, and a mirror across x = 0.

A picture does not show which side of an object its maker called the front. A model that had to guess it would be
punished for wrong guesses. Here the front is the side that the camera sees: a shape is turned by quarter turns until
the camera stands within 45° of +Z. Each view then has one right answer, and a shape seen from all round gives four
training shapes. Mirrored shapes with flipped pictures make eight.

A symmetry is an int: `quarter_turns + MIRROR * mirrored`; turns come first. Grids are indexed [x, y, z].
"""

import numpy as np

NUM_SYMMETRIES = 8
MIRROR = 4  # the mirror without a turn; symmetries from here on are mirrored


def facing(azimuth: float) -> tuple[int, float]:
    """Return the symmetry that brings a camera at `azimuth` to the front, and its azimuth there, within ±45.

    In degrees: 0 is +Z, 90 is +X.
    """
    turns = round(azimuth / 90)
    return turns % 4, azimuth - 90 * turns


def transform_voxels(xyz: np.ndarray, resolution: int, symmetry: int) -> np.ndarray:
    """Move voxel coordinates (N, 3) of any integer dtype."""
    x, y, z = xyz.T
    for _ in range(_turns(symmetry)):
        x, z = resolution - 1 - z, x
    if symmetry >= MIRROR:
        x = resolution - 1 - x
    return np.stack([x, y, z], axis=1)


def transform_grid(grid: np.ndarray, symmetry: int) -> np.ndarray:
    """Move cubic grids (..., X, Y, Z), as a view: the value at voxel p goes to `transform_voxels(p)`."""
    grid = np.rot90(grid, _turns(symmetry), axes=(-3, -1))
    return grid[..., ::-1, :, :] if symmetry >= MIRROR else grid


def transform_vertices(vertices: np.ndarray, symmetry: int) -> np.ndarray:
    """Move points (N, 3) around the origin. A mirror turns faces inside out: reverse them if `symmetry >= MIRROR`."""
    x, y, z = vertices.T
    for _ in range(_turns(symmetry)):
        x, z = -z, x
    return np.stack([-x if symmetry >= MIRROR else x, y, z], axis=1)


def inverse(symmetry: int) -> int:
    """Return the symmetry that undoes another: the opposite turn; every mirrored one undoes itself."""
    return symmetry if symmetry >= MIRROR else -_turns(symmetry) % 4


def _turns(symmetry: int) -> int:
    if not 0 <= symmetry < NUM_SYMMETRIES:
        raise ValueError(f"expected a symmetry from 0 to 7, got {symmetry}")
    return symmetry % MIRROR
