"""The 256 cases of marching cubes, derived from one rule for the faces of a cube.

Corner k of a cube lies at (k >> 2, k >> 1 & 1, k & 1). Edge e runs along axis e // 4 from corner `EDGES[e]`. A case
is a byte: bit k is set where corner k is inside. Inside corners on a diagonal of a face are joined across that
face, so outside corners meet only through faces of voxels, as in `flood_fill`. Both cubes at a face follow that rule.
Hence every segment on a face belongs to exactly two triangles, and no other edge of a triangle lies on a face: the
surface is a closed manifold in every case.
"""

from functools import cache
from itertools import pairwise

import numpy as np

CORNERS = np.array([(k >> 2, k >> 1 & 1, k & 1) for k in range(8)])  # (8,3)
ENDS = [(k, k | 4 >> axis) for axis in range(3) for k in range(8) if not k & 4 >> axis]  # (12) pairs of corners
EDGES = np.array([first for first, _ in ENDS])  # (12,) corner at which an edge begins
EDGE_OF = {frozenset(ends): edge for edge, ends in enumerate(ENDS)}


def faces_of_cube() -> list[list[int]]:
    """Return the four corners of each of the six faces, counter-clockwise seen from outside the cube."""
    faces = []
    for axis in range(3):
        u, v = 4 >> (axis + 1) % 3, 4 >> (axis + 2) % 3  # bits of the next two axes: u x v points along this one
        ring = [0, u, u | v, v]
        faces.append([k | 4 >> axis for k in ring])
        faces.append(ring[::-1])
    return faces


def loops_of_case(case: int) -> list[list[int]]:
    """Return the closed loops of crossed edges, counter-clockwise seen from outside the solid."""
    following = {}
    for face in faces_of_cube():
        inside = [bool(case >> k & 1) for k in face]
        for i in range(4):
            if inside[i] and not inside[(i + 1) % 4]:  # the segment cuts off the outside corners from here on
                j = i + 1
                while not inside[(j + 1) % 4]:
                    j += 1
                leave = EDGE_OF[frozenset((face[i], face[(i + 1) % 4]))]
                enter = EDGE_OF[frozenset((face[j % 4], face[(j + 1) % 4]))]
                following[enter] = leave
    loops = []
    while following:
        start = min(following)
        loop = [start]
        edge = following.pop(start)
        while edge != start:
            loop.append(edge)
            edge = following.pop(edge)
        loops.append(loop)
    return loops


def share_a_face(edge: int, other: int) -> bool:
    """Return whether two edges of the cube lie on the same face."""
    corners = {*ENDS[edge], *ENDS[other]}
    return any(corners <= set(face) for face in faces_of_cube())


def triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """Cut a loop into triangles by the shortest diagonals, but by none that lies on a face of the cube."""
    middle = [(CORNERS[first] + CORNERS[second]) / 2 for first, second in ENDS]

    def cost(edge: int, other: int) -> float:
        return 1e6 * share_a_face(edge, other) + float(((middle[edge] - middle[other]) ** 2).sum())

    @cache
    def best(i: int, j: int) -> tuple[float, tuple[tuple[int, int, int], ...]]:
        if j - i < 2:
            return 0.0, ()
        options = []
        for k in range(i + 1, j):
            (left, left_triangles), (right, right_triangles) = best(i, k), best(k, j)
            diagonals = sum(cost(loop[a], loop[b]) for a, b in pairwise((i, k, j)) if b - a > 1)
            options.append((left + right + diagonals, ((loop[i], loop[k], loop[j]), *left_triangles, *right_triangles)))
        return min(options, key=lambda option: option[0])

    return list(best(0, len(loop) - 1)[1])


@cache
def marching_cubes_table() -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of each case's triangles, (256,T,3) int8 padded with -1, and their counts (256,) int8."""
    cases = [[t for loop in loops_of_case(case) for t in triangulate(loop)] for case in range(256)]
    counts = np.array([len(triangles) for triangles in cases], np.int8)
    table = np.full((256, counts.max(), 3), -1, np.int8)
    for case, triangles in enumerate(cases):
        if triangles:
            table[case, : len(triangles)] = triangles
    table.setflags(write=False)
    counts.setflags(write=False)
    return table, counts
