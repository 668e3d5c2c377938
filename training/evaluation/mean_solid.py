"""A baseline for the evaluation: the mean shape, the best answer that ignores the image. Imports no torch.

The solids of the training shapes are averaged on a coarse grid. The mean is cut at the level whose solid has the
highest mean IoU with them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh
from training.data.shape_files import BLOCK, load_shape, shape_path
from training.data.symmetry import NUM_SYMMETRIES, inverse, transform_grid

CELLS = 64  # per edge of the mean
LEVELS = 100  # at which the cut is tried
STEEPNESS = 5.0  # of the field that is meshed, at the cut


class MeanSolid(NamedTuple):
    """The mean of many solids, and where to cut it."""

    mean: np.ndarray  # (CELLS, CELLS, CELLS) float32 in [0, 1]
    level: float  # at which {mean >= level} has the highest mean IoU with the solids
    iou: float  # that IoU


def solid_cells(block_coords: np.ndarray, values: np.ndarray, resolution: int, cells: int) -> np.ndarray:
    """Find the cells of a coarse grid that lie mostly inside an SDF, by its signs: (cells, cells, cells) bool.

    Args:
        block_coords: (M,3) stored blocks of 8³ voxels; values (M,8,8,8), negative inside.
        resolution: R, voxels per edge.
        cells: per edge of the coarse grid; a divisor of R and a multiple of R / 8.

    Blocks that are not stored lie wholly on one side: outside if they are connected to the border, else on the side of
    the stored voxels that touch them.

    Raises:
        ValueError: `cells` does not fit the resolution.
    """
    edge = resolution // BLOCK
    if resolution % cells or cells % edge:
        raise ValueError(f"expected cells between {edge} and {resolution} that divide {resolution}, got {cells}")
    per_block = cells // edge
    width = BLOCK // per_block
    side = np.ones((edge, edge, edge), dtype=np.float32)
    row = np.full((edge + 2,) * 3, -1, dtype=np.int64)
    row[tuple(block_coords.T.astype(np.int64) + 1)] = np.arange(len(block_coords))
    stored = row[1:-1, 1:-1, 1:-1] >= 0
    regions, count = ndimage.label(~stored)
    votes = np.zeros(count + 1)
    for axis in range(3):
        for step in (-1, 1):
            neighbor = np.roll(row, -step, axis=axis)[1:-1, 1:-1, 1:-1]  # the row of the block beyond, or -1
            touching = ~stored & (neighbor >= 0)
            facing = np.take(values, 0 if step == 1 else BLOCK - 1, axis=axis + 1)[neighbor[touching]]
            np.add.at(votes, regions[touching], np.sign(facing).mean(axis=(1, 2)))
    border = np.ones_like(stored)
    border[1:-1, 1:-1, 1:-1] = False
    votes[np.unique(regions[border])] = np.inf
    side[~stored] = np.where(votes < 0, -1, 1)[regions[~stored]]

    means = np.broadcast_to(side[..., None, None, None], (*side.shape, *(per_block,) * 3)).copy()
    pooled = np.where(values < 0, -1.0, 1.0).reshape(-1, per_block, width, per_block, width, per_block, width)
    means[stored] = pooled.mean(axis=(2, 4, 6))[row[1:-1, 1:-1, 1:-1][stored]]
    return means.transpose(0, 3, 1, 4, 2, 5).reshape(cells, cells, cells) < 0


def packed_solid(data_dir: str, resolution: int, name: str) -> np.ndarray:
    """Pack the solid of a prepared shape into bits: (CELLS³ / 8,) uint8."""
    blocks, sdf, _ = load_shape(shape_path(data_dir, resolution, name))
    cells = max(CELLS, resolution // BLOCK)
    solid = solid_cells(blocks, sdf, resolution, cells)
    width = cells // CELLS
    return np.packbits(solid.reshape(CELLS, width, CELLS, width, CELLS, width).mean(axis=(1, 3, 5)) > 0.5)


def mean_solid(solids: Iterable[tuple[np.ndarray, list[int]]]) -> MeanSolid:
    """Average solids.

    Args:
        solids: packed bits of each shape, (CELLS³ / 8,) uint8, and the symmetries in which it is seen.

    Raises:
        ValueError: no solids.
    """
    solids = list(solids)
    if not solids:
        raise ValueError("expected at least one solid, got none")

    def grids():
        for bits, symmetries in solids:
            yield np.unpackbits(bits).view(bool).reshape(CELLS, CELLS, CELLS), symmetries

    sums, count = np.zeros((NUM_SYMMETRIES, CELLS, CELLS, CELLS), dtype=np.float32), 0
    for grid, symmetries in grids():
        sums[symmetries] += grid
        count += len(symmetries)
    mean = np.asarray(sum(transform_grid(total, symmetry) for symmetry, total in enumerate(sums)) / count)
    rank = np.floor(mean * LEVELS + 1e-4).astype(np.int64)  # cells of {mean >= i / LEVELS} have rank >= i
    sizes = _at_least(np.bincount(rank.ravel(), minlength=LEVELS + 1))
    # instead of each solid, the mean is moved: back, by the inverse
    moved_back = [np.ascontiguousarray(transform_grid(rank, inverse(symmetry))) for symmetry in range(NUM_SYMMETRIES)]
    iou = np.zeros(LEVELS + 1)
    for grid, symmetries in grids():
        size = grid.sum()
        for symmetry in symmetries:
            common = _at_least(np.bincount(moved_back[symmetry][grid], minlength=LEVELS + 1))
            iou += common / np.maximum(sizes + size - common, 1)
    best = int(iou[1:].argmax()) + 1
    return MeanSolid(mean, (best - 0.5) / LEVELS, float(iou[best] / count))


def _at_least(counts: np.ndarray) -> np.ndarray:
    return counts[::-1].cumsum()[::-1]


def mesh_of_mean(mean: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Mesh the surface where the mean crosses the level: vertices (V,3) in [-1,1], faces (F,3)."""
    edge = CELLS // BLOCK
    field = np.clip((level - mean) * STEEPNESS, -1, 1)
    values = field.reshape([edge, BLOCK] * 3).transpose(0, 2, 4, 1, 3, 5).reshape(-1, BLOCK, BLOCK, BLOCK)
    block_coords = np.stack(np.unravel_index(np.arange(edge**3), (edge,) * 3), axis=1).astype(np.int32)
    mesh = sdf_to_mesh(block_coords, np.ascontiguousarray(values, dtype=np.float32), CELLS)
    return mesh.vertices, mesh.faces
