"""Marching cubes on 8^3 blocks: which grid edges the surface crosses, and the triangles between them.

Inside and outside are one bit for every voxel: eight 64-bit words for a stored block (`flood_fill`), one flag for a
block that is not stored. A cube belongs to the block of its first corner, a grid edge to that of its first end. Blocks
one step below the stored ones own cubes and edges too, so block coordinates are counted from -1 here ("owners").
A vertex is numbered by its owner and its rank among the owner's crossed edges: no vertex is ever made twice.

Sizes:
    R  voxels per edge     G = R / 8  blocks per edge     B  stored blocks     W  owners     V  vertices     F  faces
"""

import numpy as np

from .flood_fill import EIGHT, ONE, SEVEN, Y_LOW, Z_LOW
from .marching_cubes_table import CORNERS, EDGES
from .numba_kernel import kernel

MARGIN = 1e-3  # a vertex keeps this share of its grid edge from either end: no two vertices in one place
EDGE_CORNER = CORNERS[EDGES]  # (12,3) first end of each edge of a cube
FIFTY_SIX = np.uint64(56)


@kernel
def count_bits(word):
    """Set bits of a word."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> FIFTY_SIX)


@kernel
def lowest_bit(word):
    """Index of the lowest set bit."""
    return count_bits((word & (~word + ONE)) - ONE)


@kernel
def block_word(x, y, z, layer, grid, rows, outside, empty):
    """Word of a layer of any block, a set bit for an outside voxel; beyond the grid all is outside."""
    if min(x, y, z) < 0 or max(x, y, z) >= grid:
        return ~np.uint64(0)
    block = (x * grid + y) * grid + z
    if rows[block] < 0:
        return ~np.uint64(0) if empty[block] else np.uint64(0)
    return outside[rows[block], layer]


@kernel
def corner_words(owner, grid, rows, outside, empty, words):
    """words (9,4): bit 8 y + z of words[x, 2 j + k] is voxel (x, y + j, z + k) of an owner, for x up to 8."""
    side = grid + 1
    bx, by, bz = owner // (side * side) - 1, owner // side % side - 1, owner % side - 1
    for x in range(9):
        nx, layer = (bx, x) if x < 8 else (bx + 1, 0)
        here = block_word(nx, by, bz, layer, grid, rows, outside, empty)
        next_z = block_word(nx, by, bz + 1, layer, grid, rows, outside, empty)
        next_y = block_word(nx, by + 1, bz, layer, grid, rows, outside, empty)
        next_yz = block_word(nx, by + 1, bz + 1, layer, grid, rows, outside, empty)
        z_here = ((here & ~Z_LOW) >> ONE) | ((next_z & Z_LOW) << SEVEN)
        z_next = ((next_y & ~Z_LOW) >> ONE) | ((next_yz & Z_LOW) << SEVEN)
        words[x, 0] = here
        words[x, 1] = z_here
        words[x, 2] = ((here & ~Y_LOW) >> EIGHT) | ((next_y & Y_LOW) << FIFTY_SIX)
        words[x, 3] = ((z_here & ~Y_LOW) >> EIGHT) | ((z_next & Y_LOW) << FIFTY_SIX)


@kernel
def mixed_cubes(words, x):
    """Bits of the cubes in layer x that have corners on both sides."""
    some, every = np.uint64(0), ~np.uint64(0)
    for k in range(8):
        word = words[x + (k >> 2), k & 3]
        some |= word
        every &= word
    return some & ~every


@kernel
def case_of(words, x, bit):
    """The byte of a cube: bit k set where corner k is inside."""
    case = 0
    for k in range(8):
        case |= (1 - np.int64((words[x + (k >> 2), k & 3] >> np.uint64(bit)) & ONE)) << k
    return case


@kernel
def count_surface(start, stop, owners, grid, rows, outside, empty, triangle_counts, crossed, ranks, sizes):
    """For owners start..stop of owners (W,): the crossed edges, how many come before, and the totals.

    crossed (W,24) uint64 bits of edges by 8 axis + x; ranks (W,24) int16 vertices in the words before; sizes (W,2)
    vertices and triangles.
    """
    words = np.empty((9, 4), np.uint64)
    for w in range(start, stop):
        corner_words(owners[w], grid, rows, outside, empty, words)
        vertices, triangles = 0, 0
        for axis in range(3):
            for x in range(8):
                other = words[x + 1, 0] if axis == 0 else (words[x, 2] if axis == 1 else words[x, 1])
                crossed[w, 8 * axis + x] = words[x, 0] ^ other
                ranks[w, 8 * axis + x] = vertices
                vertices += count_bits(words[x, 0] ^ other)
        for x in range(8):
            cubes = mixed_cubes(words, x)
            while cubes != 0:
                triangles += triangle_counts[case_of(words, x, lowest_bit(cubes))]
                cubes &= cubes - ONE
        sizes[w, 0], sizes[w, 1] = vertices, triangles


@kernel
def value_at(x, y, z, grid, rows, outside, empty, values, level):
    """Value minus level of any voxel, of the sign that its bit says: +-1 where nothing is stored or it was turned."""
    if min(x, y, z) < 0 or max(x, y, z) >= 8 * grid:
        return 1.0
    block = ((x >> 3) * grid + (y >> 3)) * grid + (z >> 3)
    row = rows[block]
    if row < 0:
        return 1.0 if empty[block] else -1.0
    value = float(values[row, x & 7, y & 7, z & 7]) - level
    if (outside[row, x & 7] >> np.uint64((y & 7) * 8 + (z & 7))) & ONE:
        return value if value >= 0.0 else 1.0
    return value if value < 0.0 else -1.0


@kernel
def make_vertices(start, stop, owners, first, crossed, grid, rows, outside, empty, values, level, vertices, normals):
    """Vertices (V,3) of owners start..stop in the cube [-1,1]^3, linear along their edges, and the gradient there."""
    side = grid + 1
    field = (grid, rows, outside, empty, values, level)
    scale = 1.0 / (4.0 * grid)  # half of R in the denominator: p = (i + 1/2) / R * 2 - 1
    for w in range(start, stop):
        x0, y0, z0 = owners[w] // (side * side) * 8 - 8, owners[w] // side % side * 8 - 8, owners[w] % side * 8 - 8
        vertex = first[w]
        for word in range(24):
            axis = word >> 3
            bits = crossed[w, word]
            while bits != 0:
                bit = lowest_bit(bits)
                bits &= bits - ONE
                x, y, z = x0 + (word & 7), y0 + (bit >> 3), z0 + (bit & 7)
                ox, oy, oz = x + (axis == 0), y + (axis == 1), z + (axis == 2)
                here, there = value_at(x, y, z, *field), value_at(ox, oy, oz, *field)
                t = min(max(here / (here - there), MARGIN), 1.0 - MARGIN)
                vertices[vertex, 0] = min(max((x + t * (ox - x) + 0.5) * scale - 1.0, -1.0), 1.0)
                vertices[vertex, 1] = min(max((y + t * (oy - y) + 0.5) * scale - 1.0, -1.0), 1.0)
                vertices[vertex, 2] = min(max((z + t * (oz - z) + 0.5) * scale - 1.0, -1.0), 1.0)
                gx, gy, gz = 0.0, 0.0, 0.0
                for end in range(2):
                    share, px, py, pz = (1.0 - t, x, y, z) if end == 0 else (t, ox, oy, oz)
                    gx += share * (value_at(px + 1, py, pz, *field) - value_at(px - 1, py, pz, *field))
                    gy += share * (value_at(px, py + 1, pz, *field) - value_at(px, py - 1, pz, *field))
                    gz += share * (value_at(px, py, pz + 1, *field) - value_at(px, py, pz - 1, *field))
                normals[vertex, 0], normals[vertex, 1], normals[vertex, 2] = gx, gy, gz
                vertex += 1


@kernel
def make_faces(
    start, stop, owners, owner_rows, first, first_face, crossed, ranks, grid, rows, outside, empty, table, counts, faces
):
    """Faces (F,3) of owners start..stop, counter-clockwise seen from outside."""
    side = grid + 1
    words = np.empty((9, 4), np.uint64)
    for w in range(start, stop):
        face = first_face[w]
        if face == first_face[w + 1]:
            continue
        corner_words(owners[w], grid, rows, outside, empty, words)
        for x in range(8):
            cubes = mixed_cubes(words, x)
            while cubes != 0:
                bit = lowest_bit(cubes)
                cubes &= cubes - ONE
                case = case_of(words, x, bit)
                for triangle in range(counts[case]):
                    for corner in range(3):
                        edge = table[case, triangle, corner]
                        ex = x + EDGE_CORNER[edge, 0]
                        ey, ez = (bit >> 3) + EDGE_CORNER[edge, 1], (bit & 7) + EDGE_CORNER[edge, 2]
                        owner = owners[w] + ((ex >> 3) * side + (ey >> 3)) * side + (ez >> 3)
                        row = owner_rows[owner]
                        word = 8 * (edge >> 2) + (ex & 7)
                        below = (ONE << np.uint64((ey & 7) * 8 + (ez & 7))) - ONE
                        rank = ranks[row, word] + count_bits(crossed[row, word] & below)
                        faces[face, corner] = first[row] + rank
                    face += 1
