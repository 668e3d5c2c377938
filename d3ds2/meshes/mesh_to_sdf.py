"""Any triangle mesh -> the signed distance of a solid, in a narrow band stored as blocks of 8³ voxels.

The surface is thickened by `shell` voxels on either side. Whatever can be reached from beyond the grid without crossing
this shell is outside; everything else is solid. Open sheets become closed slabs, faces inside the solid never make a
surface, and self-intersections need no repair. Each block with a voxel in the band is one token of the latent grid.

Sizes:
    V  vertices     F  faces     R  voxels per edge of the cube [-1,1]³     B  blocks     N  active voxels
"""

import math
from dataclasses import dataclass

import numpy as np

from .block import BLOCK, BLOCK_VOXELS, MAX_RESOLUTION
from .flood_fill import flood_fill, pack_bits
from .numba_kernel import for_ranges, kernel
from .sharp_edges import find_sharp_edges, mark_near_edges
from .triangle_distance import blocks_near_triangles, measure_blocks, sign_blocks
from .triangles import checked_faces, checked_vertices

BAND = {
    128: 2.0,
    256: 2.0,
    384: 3.0,
    512: 4.0,
    1024: 4.0,
}  # voxels by resolution (paper, Table 1)
SHARP_RADIUS = 2.0  # voxels
FITTED_SCALE = 0.95  # of the cube is filled by a mesh that is fitted into it


@dataclass(frozen=True)
class SparseSDF:
    """A truncated signed distance, negative inside, on the blocks with at least one active voxel.

    Attributes:
        block_coords: (B,3) int32, each in [0, R/8), lexicographic.
        values: (B,8,8,8) float32, [x,y,z], distance / band clipped to [-1,1]; beyond the band +1 outside, -1 inside.
        sharp: (B,8,8,8) bool, active voxels within 2 voxels of a sharp edge.
        resolution: R; the centre of voxel i lies at (i + 1/2) / R * 2 - 1.
        band: voxels on either side of the surface in which the distance is kept.
    """

    block_coords: np.ndarray
    values: np.ndarray
    sharp: np.ndarray
    resolution: int
    band: float

    @property
    def active(self) -> np.ndarray:
        """The voxels inside the band, |value| < 1, (B,8,8,8) bool."""
        return np.abs(self.values) < 1.0

    @property
    def coords(self) -> np.ndarray:
        """The active voxels, (N,3) int32 in [0, R), sorted by block and by place in the block."""
        block, *place = np.nonzero(self.active)
        return self.block_coords[block] * np.int32(BLOCK) + np.stack(place, 1).astype(np.int32)

    @property
    def sdf(self) -> np.ndarray:
        """The values at `coords`, (N,) float32."""
        return self.values[self.active]


def normalize_mesh(vertices: np.ndarray, scale: float = FITTED_SCALE) -> np.ndarray:
    """Centre the bounding box of vertices (V,3) at the origin and make its longest side 2 * scale; (V,3) float32.

    Raises:
        ValueError: there are no vertices, some are not finite, or all lie in one point.
    """
    vertices = checked_vertices(vertices)
    low, high = vertices.min(0), vertices.max(0)
    side = (high - low).max()
    if side <= 0.0:
        raise ValueError("expected vertices with an extent, got all of them in one point")
    return ((vertices - (low + high) / 2) * (2 * scale / side)).astype(np.float32)


def mesh_to_sdf(
    vertices: np.ndarray,
    faces: np.ndarray,
    resolution: int = 256,
    band: float | None = None,
    shell: float = 0.55,
    sharp_angle: float = 30.0,
    threads: int | None = None,
) -> SparseSDF:
    """Voxelise a mesh of any quality into the truncated SDF of a closed solid.

    The solid's surface lies `shell` voxels outside the triangles: a closed mesh gets its exact SDF minus the shell, an
    open sheet becomes a slab twice as thick as the shell. From 0.5 on, nothing leaks through the triangles themselves;
    larger shells also close gaps of up to twice their size.

    Args:
        vertices: (V,3) in [-1,1]³, see `normalize_mesh`.
        faces: (F,3) vertex indices; winding does not matter.
        resolution: R, a multiple of 8.
        band: voxels on either side of the surface in which the distance is kept. Default: see `default_band`.
        shell: voxels on either side of the triangles, at least 0.5.
        sharp_angle: an edge is sharp where the normals of its two faces differ by more degrees than this. An edge of
            one face, or of more than two, is always sharp.
        threads: threads that share the work. Default: one for each core. The result does not depend on it.

    Raises:
        ValueError: the mesh is empty, a vertex is not finite or outside the cube, an index is out of range, the
            resolution is not a multiple of 8 up to 2048, the shell is below 0.5 voxels, or the band is not between
            1 + shell and the resolution.
    """
    if resolution < BLOCK or resolution % BLOCK or resolution > MAX_RESOLUTION:
        raise ValueError(
            f"expected a resolution that is a multiple of {BLOCK} up to {MAX_RESOLUTION}, got {resolution}"
        )
    band = default_band(resolution) if band is None else float(band)
    if not shell >= 0.5 or not math.isfinite(shell):
        raise ValueError(f"expected a shell of at least 0.5 voxels, got {shell}")
    if not 1.0 + shell <= band <= resolution:  # both ends of a crossing grid edge must be active
        raise ValueError(f"expected a band of at least 1 + shell = {1 + shell} up to {resolution} voxels, got {band}")
    vertices, faces = checked_vertices(vertices), checked_faces(faces, len(vertices))
    outermost = np.abs(vertices).max()
    if outermost > 1.0 + 1e-6:
        raise ValueError(f"expected vertices in [-1, 1], got coordinates up to {outermost:.6g}; see normalize_mesh")

    grid = resolution // BLOCK
    vertices = (vertices + 1.0) * (resolution / 2) - 0.5  # in voxels: the centre of voxel i at i
    triangles = np.ascontiguousarray(vertices[faces])  # (F,3,3)
    blocks, offsets, pairs = blocks_near_triangles(triangles, band + shell, grid)
    values = np.empty((len(blocks), BLOCK_VOXELS), np.float32)
    for_ranges(measure_blocks, len(blocks), threads, triangles, band + shell, grid, blocks, offsets, pairs, values)

    wall = pack_bits(values < shell)  # (B,8)
    stored = np.flatnonzero(wall.any(1))
    rows = np.full(grid**3, -1, np.int32)
    rows[blocks[stored]] = np.arange(len(stored), dtype=np.int32)
    free = ~wall[stored]
    reached, empty = np.zeros_like(free), np.zeros(grid**3, bool)
    flood_fill(grid, rows, free, reached, empty)

    fill = (rows, free, reached, empty)
    for_ranges(sign_blocks, len(blocks), threads, triangles, shell, band, grid, blocks, offsets, pairs, fill, values)
    del offsets, pairs, fill, rows, free, reached, empty
    kept = (values.max(1) > -1.0) & (values.min(1) < 1.0)
    blocks, values = blocks[kept], keep_rows(values, kept)
    edges = find_sharp_edges(vertices, faces, sharp_angle, resolution)  # (E,2,3)
    sharp = mark_near_edges(edges, SHARP_RADIUS, grid, blocks, threads) & (np.abs(values) < 1.0)
    return SparseSDF(
        block_coords=np.stack(np.unravel_index(blocks, (grid,) * 3), 1).astype(np.int32),
        values=values.reshape(-1, BLOCK, BLOCK, BLOCK),
        sharp=sharp.reshape(-1, BLOCK, BLOCK, BLOCK),
        resolution=resolution,
        band=band,
    )


def default_band(resolution: int) -> float:
    """Return the band in voxels at a resolution: that of the next smaller or equal resolution in `BAND`."""
    return BAND[max((known for known in BAND if known <= resolution), default=min(BAND))]


def keep_rows(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return values[kept], of values (B,C) and kept (B,) bool, in the memory of `values`, which is lost."""
    move_rows(values, np.flatnonzero(kept))
    values.resize((int(kept.sum()), values.shape[1]), refcheck=False)
    return values


@kernel
def move_rows(values, kept):
    """Copy the rows with the ascending indices `kept` to the front."""
    for row in range(kept.size):
        if kept[row] != row:
            values[row] = values[kept[row]]
