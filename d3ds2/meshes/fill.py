"""What is solid: all that the outside does not reach through positive voxels and blocks that are not stored."""

import numpy as np

from .flood_fill import flood_fill


def fill_from_outside(
    block_coords: np.ndarray, positive: np.ndarray, grid: int, outer_only: bool, solid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which voxels are outside.

    Args:
        block_coords: (B,3) of the stored blocks.
        positive: the words (B,8) of their voxels that are not below the level.
        grid, outer_only: see `sdf_to_mesh`.
        solid: (S,3) missing blocks that the outside may not enter.

    Returns:
        rows (G^3,) of the blocks, words (B,8) of the outside, and flags (G^3,) of the missing blocks that are outside.

    Raises:
        ValueError: a block given twice.
    """
    rows = np.full(grid**3, -1, np.int32)
    flat, closed = ((c[:, 0] * grid + c[:, 1]) * grid + c[:, 2] for c in (block_coords, solid))
    rows[flat] = np.arange(len(flat), dtype=np.int32)
    if (rows[flat] != np.arange(len(flat))).any():
        raise ValueError("expected each block once, got some twice")
    rows[closed] = len(flat)  # during the fill they share one row, of which nothing may be entered
    positive = np.concatenate([positive, np.zeros((1, 8), np.uint64)])
    outside, empty = np.zeros_like(positive) if outer_only else positive.copy(), np.zeros(grid**3, bool)
    flood_fill(grid, rows, positive, outside, empty)
    rows[closed] = -1
    return rows, outside[:-1], empty
