"""A mesh -> the structure of a finer stage: the latent voxels near its surface, chosen as in the released pipeline.

The released code measures distances on a grid whose first and last points lie on the faces of the cube. It keeps a
latent voxel when one of its 8³ points is nearer to the surface than the band. The result here is exactly the same, but
a block that lies near enough to a vertex is kept without measuring any triangle.

Sizes:
    V  vertices     F  faces     R  grid points per edge     G = R / 8  blocks per edge     B  blocks
"""

import numpy as np

from .block import BLOCK, BLOCK_LAST, BLOCK_VOXELS, MAX_RESOLUTION
from .numba_kernel import for_ranges, kernel
from .triangle_distance import blocks_near_triangles, measure_blocks
from .triangles import checked_faces, checked_vertices

BAND = 4.0  # the released threshold, in R-ths of the cube's edge
QUANTUM = 1e-7  # the released distances are multiples of it, rounded down; the cube's edge is 1
MARGIN = 1e-3  # grid units: how far beyond the band triangles are measured, and how far within it vertices must lie


@kernel
def mark_near_vertices(points, radius, grid, near):
    """Set near (G³,) for each block with a grid point nearer than `radius` to one of points (V,3); grid units."""
    squared_radius = radius * radius
    for v in range(points.shape[0]):
        x, y, z = points[v, 0], points[v, 1], points[v, 2]
        x_first, x_last = max(int((x - radius) // BLOCK), 0), min(int((x + radius) // BLOCK), grid - 1)
        y_first, y_last = max(int((y - radius) // BLOCK), 0), min(int((y + radius) // BLOCK), grid - 1)
        z_first, z_last = max(int((z - radius) // BLOCK), 0), min(int((z + radius) // BLOCK), grid - 1)
        for bx in range(x_first, x_last + 1):
            dx = x - min(max(np.rint(x), BLOCK * bx), BLOCK * bx + BLOCK_LAST)
            for by in range(y_first, y_last + 1):
                dy = y - min(max(np.rint(y), BLOCK * by), BLOCK * by + BLOCK_LAST)
                for bz in range(z_first, z_last + 1):
                    dz = z - min(max(np.rint(z), BLOCK * bz), BLOCK * bz + BLOCK_LAST)
                    if dx * dx + dy * dy + dz * dz < squared_radius:
                        near[(bx * grid + by) * grid + bz] = True


def mesh_to_structure(
    vertices: np.ndarray, faces: np.ndarray, resolution: int, band: float = BAND, threads: int | None = None
) -> np.ndarray:
    """Find the blocks of 8³ grid points with at least one point nearer than `band` to the surface.

    Grid point i of an axis lies at 2 i / (R - 1) - 1.

    Args:
        vertices: (V,3) in [-1,1]³; the released pipeline normalises them first (`mesh_to_sdf.normalize_mesh`).
        faces: (F,3) vertex indices.
        resolution: R, a multiple of 8.
        band: in R-ths of the cube's edge.
        threads: threads that share the work. Default: one for each core. The result does not depend on it.

    Returns:
        Block coordinates (B,3) int32 in [0, R/8), lexicographic.

    Raises:
        ValueError: the resolution is not a multiple of 8 up to 2048, the mesh is empty, or a vertex lies outside the
            cube or is not finite.
    """
    if resolution < BLOCK or resolution % BLOCK or resolution > MAX_RESOLUTION:
        raise ValueError(
            f"expected a resolution that is a multiple of {BLOCK} up to {MAX_RESOLUTION}, got {resolution}"
        )
    vertices, faces = checked_vertices(vertices), checked_faces(faces, len(vertices))
    outermost = np.abs(vertices).max()
    if outermost > 1.0 + 1e-6:
        raise ValueError(f"expected vertices in [-1, 1], got coordinates up to {outermost:.6g}; see normalize_mesh")
    grid = resolution // BLOCK
    points = (vertices + 1.0) * ((resolution - 1) / 2)  # in grid units
    radius = band * (resolution - 1) / resolution
    near = np.zeros(grid**3, bool)
    used = np.zeros(len(points), bool)
    used[faces] = True
    mark_near_vertices(points[used], radius - MARGIN, grid, near)
    triangles, radius = np.ascontiguousarray(points[faces]), radius + MARGIN  # (F,3,3)
    blocks, offsets, pairs = blocks_near_triangles(triangles, radius, grid, np.flatnonzero(~near))
    some = np.diff(offsets) > 0
    blocks, offsets = blocks[some], np.append(offsets[:-1][some], offsets[-1])
    distance = np.empty((len(blocks), BLOCK_VOXELS), np.float32)
    for_ranges(measure_blocks, len(blocks), threads, triangles, radius, grid, blocks, offsets, pairs, distance)
    steps = np.floor(distance.min(1, initial=np.inf).astype(np.float64) / (resolution - 1) / QUANTUM)
    near[blocks[steps * QUANTUM < band / resolution]] = True
    return np.stack(np.unravel_index(np.flatnonzero(near), (grid,) * 3), 1).astype(np.int32)
