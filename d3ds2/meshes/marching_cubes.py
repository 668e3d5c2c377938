"""Marching cubes on blocks of 8³ voxels: the grid edges that the surface crosses, and the triangles between them.

One bit for every voxel says whether it is outside: eight 64-bit words for a stored block (`flood_fill`), one flag for
a block that is not stored. A cube belongs to the block of its first corner, a grid edge to that of its first end.
Blocks one step below the stored ones own cubes and edges too, so the block coordinates of owners begin at -1.
A vertex is numbered by its owner and by its rank among the owner's crossed edges, so no vertex is made twice.

Sizes:
    R  voxels per edge     G = R / 8  blocks per edge     B  stored blocks     W  owners     V  vertices     F  faces
"""

import numpy as np

from .block import BLOCK, BLOCK_BITS, BLOCK_LAST
from .flood_fill import Y_LOW, Y_SPAN, Y_STEP, Z_LOW, Z_SPAN, Z_STEP
from .marching_cubes_table import CORNERS, EDGES
from .numba_kernel import kernel

MARGIN = 1e-3  # share of its grid edge that a vertex keeps from either end, so that no two vertices coincide
EDGE_CORNER = CORNERS[EDGES]  # (12,3) first end of each edge of a cube
EDGE_WORDS = 3 * BLOCK  # words of an owner's crossed edges: 8 for each axis
LOWEST_BIT = np.uint64(1)
TOP_BYTE = np.uint64(56)  # shift in bits


@kernel
def count_bits(word):
    """Return the number of set bits in a word."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> TOP_BYTE)


@kernel
def lowest_bit(word):
    """Return the index of the lowest set bit of a word."""
    return count_bits((word & (~word + LOWEST_BIT)) - LOWEST_BIT)


@kernel
def block_word(x, y, z, layer, grid, rows, outside, empty):
    """Return the word of a layer of any block: a set bit is an outside voxel. Beyond the grid all is outside."""
    if min(x, y, z) < 0 or max(x, y, z) >= grid:
        return ~np.uint64(0)
    block = (x * grid + y) * grid + z
    if rows[block] < 0:
        return ~np.uint64(0) if empty[block] else np.uint64(0)
    return outside[rows[block], layer]


@kernel
def corner_words(owner, grid, rows, outside, empty, words):
    """Fill words (9,4): bit 8 y + z of words[x, 2 j + k] is voxel (x, y + j, z + k) of an owner, for x up to 8."""
    side = grid + 1
    bx, by, bz = owner // (side * side) - 1, owner // side % side - 1, owner % side - 1
    for x in range(BLOCK + 1):
        nx, layer = (bx, x) if x < BLOCK else (bx + 1, 0)
        here = block_word(nx, by, bz, layer, grid, rows, outside, empty)
        next_z = block_word(nx, by, bz + 1, layer, grid, rows, outside, empty)
        next_y = block_word(nx, by + 1, bz, layer, grid, rows, outside, empty)
        next_yz = block_word(nx, by + 1, bz + 1, layer, grid, rows, outside, empty)
        z_here = ((here & ~Z_LOW) >> Z_STEP) | ((next_z & Z_LOW) << Z_SPAN)
        z_next = ((next_y & ~Z_LOW) >> Z_STEP) | ((next_yz & Z_LOW) << Z_SPAN)
        words[x, 0] = here
        words[x, 1] = z_here
        words[x, 2] = ((here & ~Y_LOW) >> Y_STEP) | ((next_y & Y_LOW) << Y_SPAN)
        words[x, 3] = ((z_here & ~Y_LOW) >> Y_STEP) | ((z_next & Y_LOW) << Y_SPAN)


@kernel
def mixed_cubes(words, x):
    """Return the bits of the cubes in layer x that have corners on both sides."""
    some, every = np.uint64(0), ~np.uint64(0)
    for k in range(8):
        word = words[x + (k >> 2), k & 3]
        some |= word
        every &= word
    return some & ~every


@kernel
def case_of(words, x, bit):
    """Return the case of a cube, a byte: bit k is set where corner k is inside."""
    case = 0
    for k in range(8):
        case |= (1 - np.int64((words[x + (k >> 2), k & 3] >> np.uint64(bit)) & LOWEST_BIT)) << k
    return case


@kernel
def count_surface(start, stop, owners, grid, rows, outside, empty, triangle_counts, crossed, ranks, sizes):
    """Count the vertices and triangles of owners start..stop of owners (W,).

    Fills crossed (W,24) uint64, a bit for each crossed edge, words by 8 axis + x; ranks (W,24) int16, the number of
    vertices in the words before; and sizes (W,2), the numbers of vertices and triangles.
    """
    words = np.empty((BLOCK + 1, 4), np.uint64)
    for w in range(start, stop):
        corner_words(owners[w], grid, rows, outside, empty, words)
        vertices, triangles = 0, 0
        for axis in range(3):
            for x in range(BLOCK):
                other = words[x + 1, 0] if axis == 0 else (words[x, 2] if axis == 1 else words[x, 1])
                crossed[w, BLOCK * axis + x] = words[x, 0] ^ other
                ranks[w, BLOCK * axis + x] = vertices
                vertices += count_bits(words[x, 0] ^ other)
        for x in range(BLOCK):
            cubes = mixed_cubes(words, x)
            while cubes != 0:
                triangles += triangle_counts[case_of(words, x, lowest_bit(cubes))]
                cubes &= cubes - LOWEST_BIT
        sizes[w, 0], sizes[w, 1] = vertices, triangles


@kernel
def value_at(x, y, z, grid, rows, outside, empty, values, level):
    """Return value minus level of any voxel; ±1 where no value is stored, or where its sign contradicts its bit."""
    if min(x, y, z) < 0 or max(x, y, z) >= BLOCK * grid:
        return 1.0
    block = ((x >> BLOCK_BITS) * grid + (y >> BLOCK_BITS)) * grid + (z >> BLOCK_BITS)
    row = rows[block]
    if row < 0:
        return 1.0 if empty[block] else -1.0
    ix, iy, iz = x & BLOCK_LAST, y & BLOCK_LAST, z & BLOCK_LAST
    value = float(values[row, ix, iy, iz]) - level
    if (outside[row, ix] >> np.uint64(iy * BLOCK + iz)) & LOWEST_BIT:
        return value if value >= 0.0 else 1.0
    return value if value < 0.0 else -1.0


@kernel
def make_vertices(start, stop, owners, first, crossed, grid, rows, outside, empty, values, level, vertices, normals):
    """Fill vertices (V,3), interpolated along their edges in the cube [-1,1]³, and normals (V,3), the gradients there.

    Only those of owners start..stop are made.
    """
    side = grid + 1
    field = (grid, rows, outside, empty, values, level)
    scale = 1.0 / (4.0 * grid)  # 2 / R: p = (i + 1/2) / R * 2 - 1
    for w in range(start, stop):
        x0 = owners[w] // (side * side) * BLOCK - BLOCK
        y0 = owners[w] // side % side * BLOCK - BLOCK
        z0 = owners[w] % side * BLOCK - BLOCK
        vertex = first[w]
        for word in range(EDGE_WORDS):
            axis = word >> BLOCK_BITS
            bits = crossed[w, word]
            while bits != 0:
                bit = lowest_bit(bits)
                bits &= bits - LOWEST_BIT
                x, y, z = x0 + (word & BLOCK_LAST), y0 + (bit >> BLOCK_BITS), z0 + (bit & BLOCK_LAST)
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
    """Fill the faces (F,3) of owners start..stop, counter-clockwise seen from outside."""
    side = grid + 1
    words = np.empty((BLOCK + 1, 4), np.uint64)
    for w in range(start, stop):
        face = first_face[w]
        if face == first_face[w + 1]:
            continue
        corner_words(owners[w], grid, rows, outside, empty, words)
        for x in range(BLOCK):
            cubes = mixed_cubes(words, x)
            while cubes != 0:
                bit = lowest_bit(cubes)
                cubes &= cubes - LOWEST_BIT
                case = case_of(words, x, bit)
                for triangle in range(counts[case]):
                    for corner in range(3):
                        edge = table[case, triangle, corner]
                        ex = x + EDGE_CORNER[edge, 0]
                        ey = (bit >> BLOCK_BITS) + EDGE_CORNER[edge, 1]
                        ez = (bit & BLOCK_LAST) + EDGE_CORNER[edge, 2]
                        step = ((ex >> BLOCK_BITS) * side + (ey >> BLOCK_BITS)) * side + (ez >> BLOCK_BITS)
                        row = owner_rows[owners[w] + step]
                        word = BLOCK * (edge >> 2) + (ex & BLOCK_LAST)
                        bit_of_edge = np.uint64((ey & BLOCK_LAST) * BLOCK + (ez & BLOCK_LAST))
                        below = (LOWEST_BIT << bit_of_edge) - LOWEST_BIT
                        rank = ranks[row, word] + count_bits(crossed[row, word] & below)
                        faces[face, corner] = first[row] + rank
                    face += 1
