"""Truncated signed distance on blocks of 8³ voxels -> one closed triangle mesh.

The outside is whatever can be reached from beyond the grid through positive voxels and missing blocks. Everything else
is solid, so no inner shell can arise, whatever values a network puts inside. The surface is a closed, oriented manifold
by construction (`marching_cubes_table`).

Sizes:
    R  voxels per edge of the cube [-1,1]³     B  blocks     V  vertices     F  faces
"""

from typing import Any

import numpy as np

from .block import BLOCK, MAX_RESOLUTION
from .fill import fill_from_outside
from .flood_fill import pack_bits
from .gap_fill import fill_gaps
from .marching_cubes import EDGE_WORDS, count_surface, make_faces, make_vertices
from .marching_cubes_table import marching_cubes_table
from .mesh import Mesh, area_weighted_normals, drop_parts
from .numba_kernel import for_ranges

# options of `sdf_to_mesh` for values that a network decoded: it may leave gaps in a surface, and crumbs beside it
DECODED_OPTIONS: dict[str, Any] = {"close_gaps": True, "min_component": 0.05}


def sdf_to_mesh(
    block_coords: np.ndarray,
    values: np.ndarray,
    resolution: int,
    level: float = 0.0,
    outer_only: bool = True,
    min_component: float = 0.0,
    keep_largest: bool = False,
    close_gaps: bool = False,
    threads: int | None = None,
) -> Mesh:
    """Extract the surface where `values` cross `level`, closed at the border of the grid and at missing blocks.

    Args:
        block_coords: (B,3) integers in [0, R/8), each block once, in any order.
        values: (B,8,8,8) floats, [x,y,z], negative inside; voxel i lies at (i + 1/2) / R * 2 - 1.
        resolution: R, a multiple of 8.
        level: in (-1,1).
        outer_only: make solid whatever the outside does not reach. Otherwise cavities keep their surface.
        min_component: drop connected parts with fewer faces than this; below 1, a share of the largest part's faces.
        keep_largest: drop all parts but the one with the most faces.
        close_gaps: close the surface smoothly where blocks are missing from it (`gap_closing`, `gap_fill`). This is
            for values from a network.
        threads: threads that share the work. Default: one for each core. The result does not depend on it.

    Raises:
        ValueError: shapes, coordinates and resolution do not fit together, a value is not finite, an option is out of
            range, a block is given twice, or there is no surface at this level.
    """
    block_coords, values = _checked_blocks(block_coords, values, resolution)
    if not -1.0 < level < 1.0:
        raise ValueError(f"expected a level in (-1, 1), got {level}")
    if not min_component >= 0.0:
        raise ValueError(f"expected min_component >= 0, got {min_component}")
    grid = resolution // BLOCK
    positive = pack_bits(values >= level)
    if close_gaps:

        def face_values(axis: int, layer: int, rows: np.ndarray) -> np.ndarray:
            return np.moveaxis(values, axis + 1, 1)[rows, layer] - level

        def face_sums(axis: int, layer: int) -> np.ndarray:
            return (values.take(layer, axis=axis + 1) - level).sum((1, 2))

        gaps = fill_gaps(block_coords, positive, face_sums, face_values, grid, outer_only)
        rows, outside, empty = gaps.rows, gaps.outside, gaps.empty
        if len(gaps.coords):
            block_coords = np.concatenate([block_coords, gaps.coords])
            values = np.concatenate([values, gaps.values + np.float32(level)])
    else:
        rows, outside, empty = fill_from_outside(block_coords, positive, grid, outer_only)

    owners = owners_of(block_coords, grid)
    crossed, ranks = np.empty((len(owners), EDGE_WORDS), np.uint64), np.empty((len(owners), EDGE_WORDS), np.int16)
    sizes = np.empty((len(owners), 2), np.int64)
    table, counts = marching_cubes_table()
    signs = (grid, rows, outside, empty)
    for_ranges(count_surface, len(owners), threads, owners, *signs, counts, crossed, ranks, sizes)
    used = sizes.any(1)
    owners, crossed, ranks = owners[used], crossed[used], ranks[used]
    first, first_face = np.concatenate([np.zeros((1, 2), np.int64), sizes[used].cumsum(0)]).T.copy()
    if not first_face[-1]:
        raise ValueError(f"expected values on both sides of {level}, got {values.min():.3g} to {values.max():.3g}")

    vertices, normals = np.empty((first[-1], 3), np.float32), np.empty((first[-1], 3), np.float32)
    for_ranges(
        make_vertices, len(owners), threads, owners, first, crossed, *signs, values, float(level), vertices, normals
    )
    owner_rows = np.full((grid + 1) ** 3, -1, np.int32)
    owner_rows[owners] = np.arange(len(owners), dtype=np.int32)
    numbering = (owner_rows, first, first_face, crossed, ranks)
    faces = np.empty((first_face[-1], 3), np.int64)
    for_ranges(make_faces, len(owners), threads, owners, *numbering, *signs, table, counts, faces)
    return finish_mesh(vertices, faces, normals, min_component, keep_largest)


def finish_mesh(
    vertices: np.ndarray, faces: np.ndarray, gradients: np.ndarray, min_component: float, keep_largest: bool
) -> Mesh:
    """Normalise the gradients in place to make them normals, then drop the parts that are too small.

    Args:
        vertices: (V,3) float32.
        faces: (F,3) int64.
        gradients: (V,3) float32 of any length; overwritten. Where one vanishes, the faces give the normal.
        min_component, keep_largest: see `sdf_to_mesh`.

    Raises:
        ValueError: min_component is larger than every part.
    """
    lengths = np.linalg.norm(gradients, axis=1)
    degenerate = lengths < 1e-6
    if degenerate.any():
        gradients[degenerate] = area_weighted_normals(vertices, faces)[degenerate]
        lengths[degenerate] = 1.0
    gradients /= lengths[:, None]
    mesh = Mesh(vertices, faces, gradients)
    return drop_parts(mesh, min_component, keep_largest) if min_component > 0.0 or keep_largest else mesh


def owners_of(block_coords: np.ndarray, grid: int) -> np.ndarray:
    """Find the blocks that own a cube or an edge that ends in one of `block_coords`.

    Args:
        block_coords: (B,3) integers in [0, G).
        grid: G.

    Returns:
        (W,) int64 ascending flat ids, x slowest, on the grid of blocks -1 to G-1.
    """
    side = grid + 1
    flat = (block_coords[:, 0] * side + block_coords[:, 1]) * side + block_coords[:, 2]
    marked = np.zeros(side**3, bool)
    for step in range(8):  # the block itself and those below it; ids begin at block -1
        marked[flat + ((step >> 2) * side + (step >> 1 & 1)) * side + (step & 1)] = True
    return np.flatnonzero(marked)


def _checked_blocks(block_coords: np.ndarray, values: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    if resolution < BLOCK or resolution % BLOCK or resolution > MAX_RESOLUTION:
        raise ValueError(
            f"expected a resolution that is a multiple of {BLOCK} up to {MAX_RESOLUTION}, got {resolution}"
        )
    block_coords, values = np.asarray(block_coords), np.asarray(values)
    if block_coords.ndim != 2 or block_coords.shape[1] != 3 or not len(block_coords):
        raise ValueError(f"expected block_coords (B, 3) with B > 0, got {block_coords.shape}")
    if values.shape != (len(block_coords), BLOCK, BLOCK, BLOCK):
        raise ValueError(f"expected values ({len(block_coords)}, 8, 8, 8), got {values.shape}")
    if block_coords.min() < 0 or block_coords.max() >= resolution // BLOCK:
        raise ValueError(
            f"expected block_coords in [0, {resolution // BLOCK}), got {block_coords.min()} to {block_coords.max()}"
        )
    values = np.ascontiguousarray(values, np.float32)
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise ValueError("expected finite values, got some that are not")
    return block_coords.astype(np.int64), values
