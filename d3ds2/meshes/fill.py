"""Tell inside from outside: whatever the outside cannot reach through positive voxels and missing blocks is solid."""

import numpy as np

from .block import BLOCK
from .flood_fill import flood_fill


def fill_from_outside(
    block_coords: np.ndarray,
    positive: np.ndarray,
    grid: int,
    outer_only: bool = True,
    solid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the voxels that are outside.

    Args:
        block_coords: (B,3) coordinates of the stored blocks, in [0, G).
        positive: words (B,8) uint64 with a bit set for each of their voxels that is not below the level (`pack_bits`).
        grid: G, blocks per edge.
        outer_only: make everything solid that the outside does not reach; otherwise cavities are outside too.
        solid: (S,3) missing blocks that the outside may not enter; None for none.

    Returns:
        The row of each block (G³,), -1 for missing ones; the words (B,8) of the voxels outside; and the missing blocks
        that are outside, (G³,) bool.

    Raises:
        ValueError: a block is given twice.
    """
    rows = np.full(grid**3, -1, np.int32)
    solid = np.zeros((0, 3), np.int64) if solid is None else solid
    flat, closed = ((c[:, 0] * grid + c[:, 1]) * grid + c[:, 2] for c in (block_coords, solid))
    rows[flat] = np.arange(len(flat), dtype=np.int32)
    if (rows[flat] != np.arange(len(flat))).any():
        raise ValueError("expected each block once, got some twice")
    rows[closed] = len(flat)  # during the fill they share one row, and no voxel of it may be entered
    positive = np.concatenate([positive, np.zeros((1, BLOCK), np.uint64)])
    outside, empty = np.zeros_like(positive) if outer_only else positive.copy(), np.zeros(grid**3, bool)
    flood_fill(grid, rows, positive, outside, empty)
    rows[closed] = -1
    return rows, outside[:-1], empty
