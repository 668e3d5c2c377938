"""Distance from the voxels of 8³ blocks to the triangles nearby, and its sign once the outside is known.

All lengths are in voxels: the centre of voxel i lies at the coordinate i. Each triangle is listed in the blocks that it
may touch; each block then measures its 512 voxels against the triangles in its list, in order. No two blocks write to
the same place, so the result does not depend on the number of threads.

Sizes:
    F  triangles     G  blocks per edge of the grid     B  blocks     P  (block, triangle) pairs
"""

import numpy as np

from .block import BLOCK, BLOCK_BITS, BLOCK_LAST, BLOCK_VOXELS
from .numba_kernel import kernel

WALL, FREE, REACHED = 0, 1, 2  # state of a voxel after a fill
LOWEST_BIT = np.uint64(1)
WORD_BITS = 6  # `voxel >> WORD_BITS` is the word of a voxel in its block (`flood_fill`)
WORD_LAST = 63  # `voxel & WORD_LAST` is its bit
MIDDLE = BLOCK_LAST / 2  # voxels from a block's first voxel to its centre
HALF_DIAGONAL = MIDDLE * 3.0**0.5  # voxels from a block's centre to its farthest voxel
FLAT = 1e-10  # a triangle is measured as its three edges where |ab x ac|² <= FLAT * (longest edge)⁴


def triangle_distance_reference(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return the distance from each of points (N,3) to the nearest of triangles (F,3,3), (N,) float64: the definition.

    The nearest point of a triangle is the foot of the perpendicular if that lies inside it, else a point of an edge.
    """
    p, t = np.asarray(points, np.float64)[:, None], np.asarray(triangles, np.float64)[None]  # (N,1,3), (1,F,3,3)
    distance = np.full((p.shape[0], t.shape[1]), np.inf)
    normal = np.cross(t[:, :, 1] - t[:, :, 0], t[:, :, 2] - t[:, :, 0])  # (1,F,3)
    area = np.linalg.norm(normal, axis=-1)
    inside = np.broadcast_to(area > 0, distance.shape)
    for corner in range(3):
        a, b = t[:, :, corner], t[:, :, (corner + 1) % 3]
        length = ((b - a) ** 2).sum(-1)
        along = (((p - a) * (b - a)).sum(-1) / np.where(length > 0, length, 1.0)).clip(0.0, 1.0)  # (N,F)
        distance = np.minimum(distance, np.linalg.norm(p - a - along[..., None] * (b - a), axis=-1))
        inside = inside & ((np.cross(b - a, p - a) * normal).sum(-1) >= 0)
    height = np.abs(((p - t[:, :, 0]) * normal).sum(-1)) / np.where(area > 0, area, 1.0)
    return np.where(inside, np.minimum(distance, height), distance).min(1)


@kernel
def nearest_on_segment(px, py, pz, ax, ay, az, bx, by, bz):
    """Return the point of the segment a-b that is nearest to p; a and b may coincide."""
    ux, uy, uz = bx - ax, by - ay, bz - az
    length = ux * ux + uy * uy + uz * uz
    t = 0.0
    if length > 0.0:
        t = min(max(((px - ax) * ux + (py - ay) * uy + (pz - az) * uz) / length, 0.0), 1.0)
    return ax + t * ux, ay + t * uy, az + t * uz


@kernel
def is_flat(triangle):
    """Return whether a triangle is too thin for barycentric coordinates; its three edges give a better distance."""
    a, b, c = triangle[0], triangle[1], triangle[2]
    ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    wx, wy, wz = c[0] - b[0], c[1] - b[1], c[2] - b[2]
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    longest = max(ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz, wx * wx + wy * wy + wz * wz)
    return nx * nx + ny * ny + nz * nz <= FLAT * longest * longest


@kernel
def nearest_on_flat(px, py, pz, triangle):
    """Return the point of the three edges that is nearest to p."""
    nearest, best = (0.0, 0.0, 0.0), np.inf
    for corner in range(3):
        a, b = triangle[corner], triangle[(corner + 1) % 3]
        x, y, z = nearest_on_segment(px, py, pz, a[0], a[1], a[2], b[0], b[1], b[2])
        squared = (px - x) ** 2 + (py - y) ** 2 + (pz - z) ** 2
        if squared < best:
            nearest, best = (x, y, z), squared
    return nearest


@kernel
def nearest_on_triangle(px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz):
    """Return the nearest point to p of a triangle that is not flat, by Voronoi regions (Ericson 2005, 5.1.5)."""
    abx, aby, abz = bx - ax, by - ay, bz - az
    acx, acy, acz = cx - ax, cy - ay, cz - az
    apx, apy, apz = px - ax, py - ay, pz - az
    d1 = abx * apx + aby * apy + abz * apz
    d2 = acx * apx + acy * apy + acz * apz
    if d1 <= 0.0 and d2 <= 0.0:
        return ax, ay, az
    bpx, bpy, bpz = px - bx, py - by, pz - bz
    d3 = abx * bpx + aby * bpy + abz * bpz
    d4 = acx * bpx + acy * bpy + acz * bpz
    if d3 >= 0.0 and d4 <= d3:
        return bx, by, bz
    vc = d1 * d4 - d3 * d2
    if vc <= 0.0 and d1 >= 0.0 and d3 <= 0.0:
        t = d1 / (d1 - d3)
        return ax + t * abx, ay + t * aby, az + t * abz
    cpx, cpy, cpz = px - cx, py - cy, pz - cz
    d5 = abx * cpx + aby * cpy + abz * cpz
    d6 = acx * cpx + acy * cpy + acz * cpz
    if d6 >= 0.0 and d5 <= d6:
        return cx, cy, cz
    vb = d5 * d2 - d1 * d6
    if vb <= 0.0 and d2 >= 0.0 and d6 <= 0.0:
        t = d2 / (d2 - d6)
        return ax + t * acx, ay + t * acy, az + t * acz
    va = d3 * d6 - d5 * d4
    if va <= 0.0 and d4 >= d3 and d5 >= d6:
        t = (d4 - d3) / ((d4 - d3) + (d5 - d6))
        return bx + t * (cx - bx), by + t * (cy - by), bz + t * (cz - bz)
    v, w = vb / (va + vb + vc), vc / (va + vb + vc)
    return ax + v * abx + w * acx, ay + v * aby + w * acy, az + v * abz + w * acz


@kernel
def nearest(px, py, pz, triangle):
    """Return the point of a triangle (3,3), flat or not, that is nearest to p."""
    if is_flat(triangle):
        return nearest_on_flat(px, py, pz, triangle)
    a, b, c = triangle[0], triangle[1], triangle[2]
    return nearest_on_triangle(px, py, pz, a[0], a[1], a[2], b[0], b[1], b[2], c[0], c[1], c[2])


@kernel
def spread(triangles, radius, grid, cursor, pairs):
    """List each triangle in the blocks whose centre is nearer than radius + half a diagonal.

    The triangle's index is written to `pairs` where the block's cursor (G³,) points, and the cursor advances. With
    `pairs` of size 0 the cursors only count. Blocks with a negative cursor are skipped.
    """
    reach = radius + HALF_DIAGONAL
    for f in range(triangles.shape[0]):
        triangle = triangles[f]
        a, b, c = triangle[0], triangle[1], triangle[2]
        flat = is_flat(triangle)
        low, high = np.empty(3, np.int64), np.empty(3, np.int64)
        for axis in range(3):
            least, most = min(a[axis], b[axis], c[axis]), max(a[axis], b[axis], c[axis])
            low[axis] = max(int(np.ceil((least - reach - MIDDLE) / BLOCK)), 0)
            high[axis] = min(int(np.floor((most + reach - MIDDLE) / BLOCK)), grid - 1)
        nx = (b[1] - a[1]) * (c[2] - a[2]) - (b[2] - a[2]) * (c[1] - a[1])
        ny = (b[2] - a[2]) * (c[0] - a[0]) - (b[0] - a[0]) * (c[2] - a[2])
        nz = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        steep = flat or abs(nz) < 1e-3 * length  # the plane says nothing about z
        for x in range(low[0], high[0] + 1):
            px = BLOCK * x + MIDDLE
            for y in range(low[1], high[1] + 1):
                py = BLOCK * y + MIDDLE
                first, last = low[2], high[2]
                if not steep:  # only the blocks whose centre is within reach of the plane
                    middle = a[2] - (nx * (px - a[0]) + ny * (py - a[1])) / nz
                    half = reach * length / abs(nz) + 1e-3
                    first = max(first, int(np.ceil((max(middle - half, -2.0 * BLOCK) - MIDDLE) / BLOCK)))
                    beyond = 1.0 * BLOCK * (grid + 2)
                    last = min(last, int(np.floor((min(middle + half, beyond) - MIDDLE) / BLOCK)))
                for z in range(first, last + 1):
                    block = (x * grid + y) * grid + z
                    if cursor[block] < 0:
                        continue
                    pz = BLOCK * z + MIDDLE
                    if flat:
                        qx, qy, qz = nearest_on_flat(px, py, pz, triangle)
                    else:
                        qx, qy, qz = nearest_on_triangle(
                            px, py, pz, a[0], a[1], a[2], b[0], b[1], b[2], c[0], c[1], c[2]
                        )
                    if (px - qx) ** 2 + (py - qy) ** 2 + (pz - qz) ** 2 < reach * reach:
                        if pairs.size > 0:
                            pairs[cursor[block]] = f
                        cursor[block] += 1


def blocks_near_triangles(
    triangles: np.ndarray, radius: float, grid: int, blocks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the triangles that may come nearer than `radius` to a voxel of each block.

    Args:
        triangles: (F,3,3) float64, corners in voxels.
        radius: voxels.
        grid: G, blocks per edge.
        blocks: (B,) ascending flat ids of the blocks to consider, x slowest. Default: all.

    Returns:
        blocks: (B,) int64, the argument; without it, the ids of the blocks with at least one triangle.
        offsets: (B+1,) int64; block i has the pairs offsets[i] to offsets[i + 1].
        pairs: (P,) int32, the triangle of each pair, ascending within a block.
    """
    cursor = np.zeros(grid**3, np.int64)
    if blocks is not None:
        cursor[:] = -1
        cursor[blocks] = 0
    spread(triangles, radius, grid, cursor, np.empty(0, np.int32))
    if blocks is None:
        blocks = np.flatnonzero(cursor)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(cursor[blocks])])
    cursor[:] = -1
    cursor[blocks] = offsets[:-1]
    pairs = np.empty(offsets[-1], np.int32)
    if pairs.size:
        spread(triangles, radius, grid, cursor, pairs)
    return blocks, offsets, pairs


@kernel
def measure_block(triangles, radius, corner, pairs, best, which):
    """Measure the block whose first voxel is corner (3,) against the triangles in `pairs`.

    Fills best (512,), the distance to the nearest triangle, and which (512,), its index; the first of equals.
    Where no triangle is nearer than radius, the distance is radius and the index -1.
    """
    best[:] = radius
    which[:] = -1
    may_be_nearer = np.empty(BLOCK, np.bool_)
    for f in pairs:
        triangle = triangles[f]
        flat = is_flat(triangle)
        ax, ay, az = triangle[0, 0] - corner[0], triangle[0, 1] - corner[1], triangle[0, 2] - corner[2]
        bx, by, bz = triangle[1, 0] - corner[0], triangle[1, 1] - corner[1], triangle[1, 2] - corner[2]
        cx, cy, cz = triangle[2, 0] - corner[0], triangle[2, 1] - corner[1], triangle[2, 2] - corner[2]
        x_first = max(int(np.ceil(min(ax, bx, cx) - radius)), 0)
        y_first = max(int(np.ceil(min(ay, by, cy) - radius)), 0)
        x_last = min(int(np.floor(max(ax, bx, cx) + radius)), BLOCK_LAST)
        y_last = min(int(np.floor(max(ay, by, cy) + radius)), BLOCK_LAST)
        nx = (by - ay) * (cz - az) - (bz - az) * (cy - ay)
        ny = (bz - az) * (cx - ax) - (bx - ax) * (cz - az)
        nz = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        scale = 0.0 if flat else 1.0 / length
        nx, ny, nz = nx * scale, ny * scale, nz * scale
        mx, my, mz = (ax + bx + cx) / 3.0, (ay + by + cy) / 3.0, (az + bz + cz) / 3.0
        a_far = (ax - mx) ** 2 + (ay - my) ** 2 + (az - mz) ** 2
        b_far = (bx - mx) ** 2 + (by - my) ** 2 + (bz - mz) ** 2
        c_far = (cx - mx) ** 2 + (cy - my) ** 2 + (cz - mz) ** 2
        extent = np.sqrt(max(a_far, b_far, c_far))
        for x in range(x_first, x_last + 1):
            for y in range(y_first, y_last + 1):
                line = (x * BLOCK + y) * BLOCK
                across = nx * (x - ax) + ny * (y - ay) - nz * az
                beside = (x - mx) ** 2 + (y - my) ** 2
                some = False
                for z in range(BLOCK):  # skip voxels too far from the plane, or from a ball around the triangle
                    to_plane, to_ball = abs(across + nz * z), beside + (z - mz) ** 2
                    known = best[line + z]
                    may_be_nearer[z] = (to_plane < known) & (to_ball < (known + extent) ** 2)
                    some |= may_be_nearer[z]
                if not some:
                    continue
                for z in range(BLOCK):
                    if not may_be_nearer[z]:
                        continue
                    px, py, pz = float(x), float(y), float(z)
                    if flat:
                        qx, qy, qz = nearest_on_flat(px + corner[0], py + corner[1], pz + corner[2], triangle)
                        qx, qy, qz = qx - corner[0], qy - corner[1], qz - corner[2]
                    else:
                        qx, qy, qz = nearest_on_triangle(px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz)
                    found = np.sqrt((px - qx) ** 2 + (py - qy) ** 2 + (pz - qz) ** 2)
                    if found < best[line + z]:
                        best[line + z] = found
                        which[line + z] = f


@kernel
def measure_blocks(start, stop, triangles, radius, grid, blocks, offsets, pairs, distance):
    """Fill rows start..stop of distance (B,512) in voxels: inf where no triangle is nearer than radius."""
    best, which = np.empty(BLOCK_VOXELS), np.empty(BLOCK_VOXELS, np.int32)
    corner = np.empty(3)
    for row in range(start, stop):
        block = blocks[row]
        corner[0] = BLOCK * (block // (grid * grid))
        corner[1] = BLOCK * (block // grid % grid)
        corner[2] = BLOCK * (block % grid)
        measure_block(triangles, radius, corner, pairs[offsets[row] : offsets[row + 1]], best, which)
        for voxel in range(BLOCK_VOXELS):
            distance[row, voxel] = best[voxel] if which[voxel] >= 0 else np.inf


@kernel
def side_of(x, y, z, grid, rows, free, reached, empty):
    """Return WALL, FREE or REACHED for a voxel after a fill; REACHED beyond the grid."""
    if min(x, y, z) < 0 or max(x, y, z) >= BLOCK * grid:
        return REACHED
    block = ((x >> BLOCK_BITS) * grid + (y >> BLOCK_BITS)) * grid + (z >> BLOCK_BITS)
    row = rows[block]
    if row < 0:
        return REACHED if empty[block] else FREE
    layer = x & BLOCK_LAST
    bit = LOWEST_BIT << np.uint64((y & BLOCK_LAST) * BLOCK + (z & BLOCK_LAST))
    if reached[row, layer] & bit:
        return REACHED
    return FREE if free[row, layer] & bit else WALL


@kernel
def left_outside(x, y, z, triangle, shell, grid, rows, free, reached, empty):
    """Return whether the way from a triangle through a voxel of the shell leads outside.

    The side of the first free voxel on the way decides. Two sheets that leave no free voxel for 2 voxels make one slab:
    there the answer is yes.
    """
    qx, qy, qz = nearest(x, y, z, triangle)
    dx, dy, dz = x - qx, y - qy, z - qz
    length = np.sqrt(dx * dx + dy * dy + dz * dz)
    if length == 0.0:
        return True
    for step in range(1, 9):
        t = (shell + 0.25 * step) / length
        px, py, pz = int(np.rint(qx + t * dx)), int(np.rint(qy + t * dy)), int(np.rint(qz + t * dz))
        side = side_of(px, py, pz, grid, rows, free, reached, empty)
        if side != WALL:
            return side == REACHED
    return True


@kernel
def sign_blocks(start, stop, triangles, shell, band, grid, blocks, offsets, pairs, fill, values):
    """Turn the distances in rows start..stop of values (B,512), in voxels, into the truncated SDF of the solid."""
    rows, free, reached, empty = fill
    best, which = np.empty(BLOCK_VOXELS), np.empty(BLOCK_VOXELS, np.int32)
    corner = np.empty(3)
    for row in range(start, stop):
        block = blocks[row]
        stored = rows[block]
        if stored < 0:
            sign, shift = (1.0, -shell) if empty[block] else (-1.0, shell)
            for voxel in range(BLOCK_VOXELS):
                values[row, voxel] = sign * min((values[row, voxel] + shift) / band, 1.0)
            continue
        corner[0] = BLOCK * (block // (grid * grid))
        corner[1] = BLOCK * (block // grid % grid)
        corner[2] = BLOCK * (block % grid)
        measure_block(triangles, shell, corner, pairs[offsets[row] : offsets[row + 1]], best, which)
        for voxel in range(BLOCK_VOXELS):
            layer, bit = voxel >> WORD_BITS, LOWEST_BIT << np.uint64(voxel & WORD_LAST)
            outside = (reached[stored, layer] & bit) != 0
            if not free[stored, layer] & bit:
                x = corner[0] + layer
                y = corner[1] + (voxel >> BLOCK_BITS & BLOCK_LAST)
                z = corner[2] + (voxel & BLOCK_LAST)
                outside = left_outside(x, y, z, triangles[which[voxel]], shell, grid, rows, free, reached, empty)
            distance = values[row, voxel]
            signed = distance - shell if outside else -(distance + shell)
            values[row, voxel] = min(max(signed / band, -1.0), 1.0)
