"""Fill the gaps of a surface smoothly: SDF values for the missing blocks where inside and outside meet.

`gap_closing` judges which missing blocks are inside. Where such a block touches the outside, or a missing block outside
touches a solid voxel, no stored value says how the surface goes on. So the missing blocks in two layers on either side
of such places get values u, which solve Laplace's equation ∇²u = 0 on their voxels. Around them, u is the stored value
in a stored block, -1 in another missing block inside, and +1 in another one outside or beyond the grid. The surface
u = 0 is smooth, and ends at the stored surfaces.

Where the inside is not much thicker than its layers, no block near is left at -1, and the gap would open again. Such
blocks solve ∇²u = (u + 1) / SCREENING² instead, which draws u to -1; likewise to +1 where the outside is that thin. A
SCREENING of one block keeps about the thickness of a sheet of one block: between layers d thick, u = 0 lies on the
faces of a sheet 2 w thick if tanh(w / SCREENING) / SCREENING = 1 / d; with w = 4 and d = 16 voxels, the two
sides are 0.058 and 0.063.

The outside cannot leak in. The missing blocks inside are closed at first, and a stored voxel that the outside does not
reach then is solid for good. A new voxel is outside only if u is positive there and the outside reaches it.

The solver goes from cells of 8³ voxels to cells of 4³, 2³ and 1³. Its steps are limited in such a way that the time
grows no faster than the number of blocks.

Sizes:
    G = R / 8  blocks per edge     B  stored blocks     n  blocks that get values     m  cells per edge of a block
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from .block import BLOCK, BLOCK_LAST
from .fill import fill_from_outside
from .flood_fill import pack_bits, unpack_bits
from .gap_closing import FaceSums, enclosed_solid_blocks, widened

LAYERS = 2  # of blocks on either side of the border; steps of 8 voxels show through one layer, and three change little
SCREENING = 8.0  # voxels
MOST_STEPS, LEAST_STEPS = 100, 8  # of the solver, for each size of cells; about 30 are needed
CELL_STEPS = 1 << 24  # product of cells and steps beyond which there are fewer steps
TOLERANCE = 1e-3  # of the equations, as a share of what they have to balance

FaceValues = Callable[[int, int, np.ndarray], np.ndarray]


class FilledGaps(NamedTuple):
    """The blocks that close the gaps, and what is outside once they are stored after the others."""

    coords: np.ndarray  # (n,3) integers, ascending, x slowest
    values: np.ndarray  # (n,8,8,8) float32 relative to the level, negative inside
    rows: np.ndarray  # (G³,) of all B + n blocks; this and the rest is what `fill_from_outside` returns
    outside: np.ndarray  # (B+n,8) uint64
    empty: np.ndarray  # (G³,) bool


def fill_gaps(
    block_coords: np.ndarray,
    positive: np.ndarray,
    face_sums: FaceSums,
    face_values: FaceValues,
    grid: int,
    outer_only: bool = True,
) -> FilledGaps:
    """Find the missing blocks that close the gaps, and their values; none if no block is missing from the surface.

    Args:
        block_coords: (B,3) integers in [0, G), each block once.
        positive: words (B,8) uint64 of the voxels that are not below the level (`pack_bits`).
        face_sums: see `enclosed_solid_blocks`.
        face_values: called with an axis, a layer and the rows (k,) of some blocks; returns the values (k,8,8) in that
            layer of those blocks, relative to the level.
        grid: G.
        outer_only: see `fill_from_outside`.

    Raises:
        ValueError: a block is given twice.
    """
    solid = enclosed_solid_blocks(block_coords, face_sums, grid)
    filled = fill_from_outside(block_coords, positive, grid, outer_only, solid)
    _, outside, empty = filled
    rows = np.pad(filled[0].reshape((grid,) * 3), 1, constant_values=-1)  # from here on with a margin beyond the grid
    is_open = np.pad(empty.reshape((grid,) * 3), 1, constant_values=True)
    is_inside = (rows < 0) & ~is_open
    chosen, is_thin = _layers_about_the_border(is_inside, is_open, block_coords + 1, outside)
    coords = np.argwhere(chosen)
    if not len(coords):
        return FilledGaps(coords, np.zeros((0, BLOCK, BLOCK, BLOCK), np.float32), *filled)
    side = np.where(is_inside, np.int8(-1), np.int8(1))
    near, fixed = _surroundings(coords, rows, outside, side, face_values)
    values = _solve(near, fixed, np.where(is_thin[chosen], side[chosen], 0.0)).astype(np.float32)
    coords, positive = coords - 1, np.concatenate([outside, pack_bits(values >= 0)])
    closed = np.argwhere(is_inside & ~chosen) - 1
    filled = fill_from_outside(np.concatenate([block_coords, coords]), positive, grid, outer_only, closed)
    return FilledGaps(coords, values, *filled)


def _layers_about_the_border(
    is_inside: np.ndarray, is_open: np.ndarray, stored: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the missing blocks about the places where a missing block touches the other side.

    Args:
        is_inside, is_open: the missing blocks on either side, (G+2,) * 3 bool, with a margin that is open.
        stored: (B,3) integers, which count the margin.
        outside: words (B,8) uint64 of the stored voxels that are outside.

    Returns:
        The chosen blocks, (G+2,) * 3 bool; and those of them that have no other missing block of their side near.
    """
    in_grid = np.pad(np.ones([size - 2 for size in is_open.shape], bool), 1)
    meets_open, meets_inside = ndimage.binary_dilation(is_open), ndimage.binary_dilation(is_inside)  # across faces
    for axis in range(3):
        for end in range(2):
            beside = stored.copy()
            beside[:, axis] += 2 * end - 1
            mask = _face_mask(axis, end)
            meets_open[tuple(beside[(outside & mask).any(1)].T)] = True
            meets_inside[tuple(beside[(~outside & mask).any(1)].T)] = True
    can_fill = is_open & in_grid
    inner, outer = is_inside & meets_open, can_fill & meets_inside
    inner, outer = inner | (widened(outer) & is_inside), outer | (widened(inner) & can_fill)
    inner, outer = _grown(inner, is_inside, LAYERS - 1), _grown(outer, can_fill, LAYERS - 1)
    is_thin = inner & ~_grown(is_inside & ~inner, is_inside, LAYERS + 1)
    is_thin |= outer & ~_grown(is_open & ~outer, is_open, LAYERS + 1)
    return inner | outer, is_thin


def _face_mask(axis: int, end: int) -> np.ndarray:
    """Return the bits of a block's first or last layer along an axis, (8,) uint64."""
    layer = np.zeros((BLOCK,) * 3, bool)
    np.moveaxis(layer, axis, 0)[-end] = True
    return pack_bits(layer[None])[0]


def _grown(mask: np.ndarray, among: np.ndarray, steps: int) -> np.ndarray:
    """Add to a mask what is `among` its neighbours, some steps far."""
    for _ in range(steps):
        mask = widened(mask) & among
    return mask


def _surroundings(
    coords: np.ndarray, rows: np.ndarray, outside: np.ndarray, side: np.ndarray, face_values: FaceValues
) -> tuple[np.ndarray, np.ndarray]:
    """Find what lies around the chosen blocks.

    Args:
        coords: (n,3) integers, which count the margin.
        rows: (G+2,) * 3 row of each stored block, -1 for the others.
        outside: words (B,8) uint64 of the stored voxels that are outside.
        side: (G+2,) * 3 value of each missing block that is not chosen.

    Returns:
        See `_solve`: near and fixed.
    """
    n = len(coords)
    numbers = np.full(rows.shape, n, np.int32)
    numbers[tuple(coords.T)] = np.arange(n)
    near, fixed = np.empty((3, 2, n), np.int64), np.empty((3, 2, n, BLOCK, BLOCK))
    for axis in range(3):
        for end, layer in enumerate((BLOCK_LAST, 0)):
            beside = coords.copy()
            beside[:, axis] += 2 * end - 1
            place = tuple(beside.T)
            near[axis, end] = numbers[place]
            fixed[axis, end] = np.where(numbers[place] < n, 0.0, side[place])[:, None, None]
            is_stored = rows[place] >= 0
            stored = rows[place][is_stored]
            values = face_values(axis, layer, stored).astype(np.float64)
            is_outside = unpack_bits(outside[stored]).reshape(-1, BLOCK, BLOCK, BLOCK).take(layer, axis + 1)
            # as in marching cubes, a value whose sign contradicts its voxel's bit does not count
            agrees = (values >= 0) == is_outside
            fixed[axis, end, is_stored] = np.where(agrees, values, np.where(is_outside, 1.0, -1.0))
    return near, fixed


def _solve(near: np.ndarray, fixed: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Solve Laplace's equation on the voxels of n blocks.

    Args:
        near: (3,2,n) the block below and the block above along each axis; n if it is not one of these blocks.
        fixed: (3,2,n,8,8) the values across that face; 0 if the neighbour is one of these blocks.
        drawn: (n,) -1 or +1 for blocks that are drawn to it, 0 for the others.

    Returns:
        (n,8,8,8) float64.
    """
    n = len(drawn)
    u = np.zeros((n, 1, 1, 1))
    while True:
        m = u.shape[1]
        edge = BLOCK // m  # of a cell, in voxels
        pull = (np.abs(drawn) * (edge / SCREENING) ** 2)[:, None, None, None]
        right = np.broadcast_to(pull * drawn[:, None, None, None], u.shape).copy()
        faces = fixed.reshape(3, 2, n, m, edge, m, edge).mean((4, 6))
        for axis in range(3):
            layers = np.moveaxis(right, axis + 1, 1)
            layers[:, 0] += faces[axis, 0]
            layers[:, -1] += faces[axis, 1]
        u = _conjugate_gradients(6.0 + pull, near, right, u)
        if m == BLOCK:
            return u
        u = u.repeat(2, 1).repeat(2, 2).repeat(2, 3)


def _conjugate_gradients(diagonal: np.ndarray, near: np.ndarray, right: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Solve diagonal * u - _neighbor_sums(u, near) = right from a first guess u, (n,m,m,m).

    The solver of scipy takes its sums by BLAS, whose rounding depends on the number of threads; a mesh must not.
    """
    residual = right - diagonal * u + _neighbor_sums(u, near)
    direction, length = residual.copy(), _dot(residual, residual)
    enough = TOLERANCE**2 * _dot(right, right)
    for _ in range(min(max(CELL_STEPS // u.size, LEAST_STEPS), MOST_STEPS)):
        if length <= enough:
            break
        applied = diagonal * direction - _neighbor_sums(direction, near)
        step = length / _dot(direction, applied)
        u = u + step * direction
        residual -= step * applied
        length, before = _dot(residual, residual), length
        direction = residual + (length / before) * direction
    return u


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("i,i", a.ravel(), b.ravel()))


def _neighbor_sums(u: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Sum the six neighbours of each cell, (n,m,m,m), as far as they are in these blocks."""
    total = np.zeros_like(u)
    for axis, (below, above) in enumerate(near):
        layers, sums = np.moveaxis(u, axis + 1, 1), np.moveaxis(total, axis + 1, 1)
        none = np.zeros_like(layers[:1, 0])
        sums[:, 1:] += layers[:, :-1]
        sums[:, :-1] += layers[:, 1:]
        sums[:, 0] += np.concatenate([layers[:, -1], none])[below]
        sums[:, -1] += np.concatenate([layers[:, 0], none])[above]
    return total
