"""Judge which missing blocks are inside, where a network left blocks out of a surface.

A truncated SDF stores the blocks along the surface; a flood fill decides whether a block that is not stored is inside
or outside. One block missing from the surface lets the fill in, and the solid comes out hollow. Here a missing block
counts as solid if its surroundings say so, in either of two ways. `gap_fill` then makes the surface across the gap.

- It looks along 26 lines. The values on the face of the first stored block on a line tell whether that face is seen
  from inside or from outside; a line that leaves the grid is a weak sign of the outside. The mean decides. This closes
  large holes. Cups and arches stay open, because their walls are seen from outside.
- It belongs to a region that the outside reaches only through openings narrower than three blocks, and the values
  around the region are negative on average.

If no block is missing from the surface, only blocks that the outside does not reach are judged to be inside.

Sizes:
    G = R / 8  blocks per edge     B  stored blocks     S  missing blocks that are solid
"""

from collections.abc import Callable
from itertools import product

import numpy as np
from scipy import ndimage

from .block import BLOCK, BLOCK_LAST

DIRECTIONS = [direction for direction in product((-1, 0, 1), repeat=3) if any(direction)]
OPEN_VALUE = 0.4  # SDF value that stands for a line that leaves the grid; chosen on generated shapes of the val split
FACE_VOXELS = BLOCK**2

FaceSums = Callable[[int, int], np.ndarray]


def enclosed_solid_blocks(block_coords: np.ndarray, face_sums: FaceSums, grid: int) -> np.ndarray:
    """Find the missing blocks that are inside, (S,3) integers.

    Args:
        block_coords: (B,3) integers in [0, G), each block once.
        face_sums: called with an axis and a layer; returns the sum (B,) of the 64 values in that layer of each block,
            negative inside.
        grid: G.
    """
    faces = {(axis, layer): np.asarray(face_sums(axis, layer)) for axis in range(3) for layer in (0, BLOCK_LAST)}
    stored = np.zeros((grid + 2,) * 3, bool)  # with a margin of one outside block on every side
    stored[tuple(block_coords.T + 1)] = True
    solid = ~stored & ((_sight(block_coords, faces, stored) < 0) | _negative_regions(block_coords, faces, stored))
    return np.argwhere(solid) - 1


def _sight(block_coords: np.ndarray, faces: dict[tuple[int, int], np.ndarray], stored: np.ndarray) -> np.ndarray:
    """Sum what each block sees along the 26 lines: (G+2,) * 3 float32, negative where that is the inside."""
    total = np.zeros(stored.shape, np.float32)
    place = tuple(block_coords.T + 1)
    facing = np.zeros(stored.shape, np.float32)
    for direction in DIRECTIONS:
        seen = [faces[axis, 0 if step > 0 else BLOCK_LAST] for axis, step in enumerate(direction) if step]
        facing[place] = np.mean(seen, axis=0) / FACE_VOXELS
        total += _first_met(facing, stored, direction)
    return total


def _first_met(facing: np.ndarray, stored: np.ndarray, direction: tuple[int, ...]) -> np.ndarray:
    """Return `facing` of the first stored block in a direction from each block, (G+2,) * 3; else OPEN_VALUE."""
    axis = next(axis for axis, step in enumerate(direction) if step)
    met, inner = np.full(stored.shape, OPEN_VALUE, np.float32), slice(1, -1)
    layers, facing, stored = np.moveaxis(met, axis, 0), np.moveaxis(facing, axis, 0), np.moveaxis(stored, axis, 0)
    size = len(layers) - 2
    ahead = tuple(slice(1 + step, 1 + step + size) for a, step in enumerate(direction) if a != axis)
    for layer in range(size, 0, -1) if direction[axis] > 0 else range(1, size + 1):
        after = layer + direction[axis]
        layers[layer, inner, inner] = np.where(stored[after][ahead], facing[after][ahead], layers[after][ahead])
    return met


def _negative_regions(
    block_coords: np.ndarray, faces: dict[tuple[int, int], np.ndarray], stored: np.ndarray
) -> np.ndarray:
    """Mark missing blocks in nearly closed regions whose surroundings are negative on average, (G+2,) * 3 bool."""
    narrowed = np.pad(~widened(stored), 1, constant_values=True)
    labels = ndimage.label(narrowed)[0]
    outside = widened(labels == labels[0, 0, 0])[1:-1, 1:-1, 1:-1]
    labels, count = ndimage.label(~stored & ~outside)
    total = np.zeros(count + 1)  # sum of the values that touch each region
    for (axis, layer), values in faces.items():  # the face of a stored block toward its neighbour
        neighbor = block_coords + 1
        neighbor[:, axis] += -1 if layer == 0 else 1
        total += np.bincount(labels[tuple(neighbor.T)], values, count + 1)
    return (labels > 0) & (total < 0)[labels]


def widened(mask: np.ndarray) -> np.ndarray:
    """Add to a mask (X,Y,Z) the neighbours of what is in it, across faces, edges and corners."""
    for axis in range(3):
        before, mask = np.moveaxis(mask, axis, 0), mask.copy()
        widened = np.moveaxis(mask, axis, 0)
        widened[1:] |= before[:-1]
        widened[:-1] |= before[1:]
    return mask
