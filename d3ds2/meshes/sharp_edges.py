"""The sharp edges of a mesh, and the voxels near them, which the sharp term of the SDF loss (eq. 2) weighs.

Sizes:
    V  vertices     F  faces     E  sharp edges     B  blocks
"""

import math

import numpy as np

from .block import BLOCK, BLOCK_LAST, BLOCK_VOXELS
from .numba_kernel import for_ranges, kernel
from .triangle_distance import blocks_near_triangles

STEPS_PER_VOXEL = 1024  # vertices that round to the same step of this grid are one vertex


def find_sharp_edges(vertices: np.ndarray, faces: np.ndarray, angle: float, resolution: int) -> np.ndarray:
    """Find the edges where two faces meet at more than `angle` degrees, and the edges of one face or of more than two.

    Vertices in the same place are merged first. Of several faces on the same three vertices only one counts, and a face
    with two corners in the same place counts not at all. The winding of the faces does not matter.

    Args:
        vertices: (V,3) float64 in voxels, the centre of voxel i at i.
        faces: (F,3) int64.
        angle: degrees between the normals.
        resolution: R.

    Returns:
        End points, (E,2,3) float64, voxels.
    """
    steps = np.rint((vertices + 1.0) * STEPS_PER_VOXEL).astype(np.int64)
    width = (resolution + 2) * STEPS_PER_VOXEL
    key = (steps[:, 0] * width + steps[:, 1]) * width + steps[:, 2]
    _, first, welded = np.unique(key, return_index=True, return_inverse=True)
    vertices, faces = vertices[first], welded[faces]

    corners = np.sort(faces, 1)
    faces = faces[(corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])]
    if not len(faces):
        return np.empty((0, 2, 3))
    corners = np.sort(faces, 1)
    order = np.lexsort(corners.T)
    repeated = (corners[order[1:]] == corners[order[:-1]]).all(1)
    faces = faces[np.sort(order[np.concatenate([[True], ~repeated])])]

    a, b, c = vertices[faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)

    tail, head = faces.ravel(), np.roll(faces, -1, 1).ravel()  # three directed edges of every face
    key = np.minimum(tail, head) * len(vertices) + np.maximum(tail, head)
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))  # first of each group of one undirected edge
    counts = np.diff(starts, append=len(order))
    one, other = order[starts], order[np.minimum(starts + 1, len(order) - 1)]
    same_winding = tail[one] != tail[other]  # neighbours wound alike run along their edge in opposite directions
    cosine = (normals[one // 3] * normals[other // 3]).sum(1) * np.where(same_winding, 1.0, -1.0)
    sharp = (counts != 2) | (cosine < math.cos(math.radians(angle)))
    return np.stack([vertices[tail[one[sharp]]], vertices[head[one[sharp]]]], 1)


@kernel
def mark_blocks(start, stop, edges, radius, grid, blocks, offsets, pairs, near):
    """Set near (B,512), in rows start..stop, for each voxel at most radius away from one of edges (E,2,3)."""
    low, high, corner = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3, np.int64)
    for row in range(start, stop):
        block = blocks[row]
        corner[0] = BLOCK * (block // (grid * grid))
        corner[1] = BLOCK * (block // grid % grid)
        corner[2] = BLOCK * (block % grid)
        for pair in range(offsets[row], offsets[row + 1]):
            a, b = edges[pairs[pair], 0], edges[pairs[pair], 1]
            ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
            length = max(ux * ux + uy * uy + uz * uz, 1e-300)
            for axis in range(3):
                low[axis] = max(int(np.ceil(min(a[axis], b[axis]) - radius)) - corner[axis], 0)
                high[axis] = min(int(np.floor(max(a[axis], b[axis]) + radius)) - corner[axis], BLOCK_LAST)
            for x in range(low[0], high[0] + 1):
                for y in range(low[1], high[1] + 1):
                    for z in range(low[2], high[2] + 1):
                        voxel = (x * BLOCK + y) * BLOCK + z
                        if near[row, voxel]:
                            continue
                        px, py, pz = corner[0] + x - a[0], corner[1] + y - a[1], corner[2] + z - a[2]
                        t = min(max((px * ux + py * uy + pz * uz) / length, 0.0), 1.0)  # along the edge
                        if (px - t * ux) ** 2 + (py - t * uy) ** 2 + (pz - t * uz) ** 2 <= radius * radius:
                            near[row, voxel] = True


def mark_near_edges(
    edges: np.ndarray, radius: float, grid: int, blocks: np.ndarray, threads: int | None = None
) -> np.ndarray:
    """Mark the voxels of `blocks` that are at most `radius` voxels away from an edge.

    Args:
        edges: (E,2,3) float64, voxels.
        radius: voxels.
        grid: G, blocks per edge of the grid.
        blocks: (B,) ascending flat block ids, x slowest.
        threads: threads that share the work. Default: one for each core.

    Returns:
        (B,512) bool.
    """
    near = np.zeros((len(blocks), BLOCK_VOXELS), bool)
    if len(edges) and len(blocks):
        _, offsets, pairs = blocks_near_triangles(edges[:, [0, 1, 1]], radius, grid, blocks)
        for_ranges(mark_blocks, len(blocks), threads, edges, radius, grid, blocks, offsets, pairs, near)
    return near
