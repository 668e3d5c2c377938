"""Blocks that a network left out of a surface: keep the outside from leaking through them into the solid.

A truncated SDF stores the blocks along the surface; whether a block that is not stored is inside or outside follows
from a flood fill. One missing block of a surface lets the fill in, and the solid comes out hollow. Here a region of
missing blocks that the outside reaches only through openings narrower than three blocks is judged by the values that
surround it: solid where their mean is negative.

G = R / 8 blocks per edge, B blocks.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

SURROUND = np.ones((3, 3, 3), bool)


def enclosed_solid_blocks(
    block_coords: np.ndarray, face_sums: Callable[[int, int], np.ndarray], grid: int
) -> np.ndarray:
    """Missing blocks that are inside, (S,3) integers.

    Args:
        block_coords: (B,3) integers in [0, G), each block once.
        face_sums: of (axis, layer), the sum (B,) of the 64 values, negative inside, in that layer of each block.
        grid: G.
    """
    rows = np.full((grid + 2,) * 3, -1, np.int64)  # one block of outside all round
    rows[tuple(block_coords.T + 1)] = np.arange(len(block_coords))
    missing = rows < 0
    narrowed = np.pad(~ndimage.binary_dilation(~missing, SURROUND), 1, constant_values=True)
    labels = ndimage.label(narrowed)[0]
    outside = ndimage.binary_dilation(labels == labels[0, 0, 0], SURROUND)[1:-1, 1:-1, 1:-1]
    labels, count = ndimage.label(missing & ~outside)
    if count == 0:
        return np.zeros((0, 3), np.int64)

    total = np.zeros(count + 1)  # of the values that touch each region
    for axis in range(3):
        for layer, step in ((0, -1), (7, 1)):  # the face of a stored block toward its neighbour
            neighbor = block_coords + 1
            neighbor[:, axis] += step
            np.add.at(total, labels[tuple(neighbor.T)], face_sums(axis, layer))
    return np.argwhere((labels > 0) & (total < 0)[labels]) - 1
