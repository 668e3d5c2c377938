"""Fill a grid from outside. The grid consists of blocks of 8³ voxels, and only some blocks are stored.

The fill goes through the faces of voxels. Everything beyond the grid is outside. A block that is not stored is free
as a whole. A stored block is eight 64-bit words, one for each x; bit 8 y + z of a word is a voxel, so one operation
on a word moves the front of 64 voxels. No array is as large as the whole voxel grid.

Sizes:
    R  voxels per edge     G = R / 8  blocks per edge     B  stored blocks
"""

import numpy as np

from .block import BLOCK, BLOCK_LAST
from .numba_kernel import kernel

# shifts of a word, in bits
Z_STEP = np.uint64(1)  # from a voxel to the next in z
Y_STEP = np.uint64(BLOCK)
Z_SPAN = np.uint64(BLOCK_LAST)  # from z = 0 to z = 7
Y_SPAN = np.uint64(BLOCK_LAST * BLOCK)
# masks of a word
Z_LOW = np.uint64(0x0101010101010101)  # the voxels with z = 0
Z_HIGH = np.uint64(0x8080808080808080)  # z = 7
Y_LOW = np.uint64(0xFF)  # y = 0
Y_HIGH = np.uint64(0xFF00000000000000)  # y = 7


def pack_bits(mask: np.ndarray) -> np.ndarray:
    """Pack one bool for each voxel, (B,512) or (B,8,8,8), into the words of a fill, (B,8) uint64."""
    return np.packbits(mask.reshape(-1, BLOCK * BLOCK), axis=1, bitorder="little").view("<u8").reshape(-1, BLOCK)


def unpack_bits(words: np.ndarray) -> np.ndarray:
    """Unpack the words of a fill, (B,8) uint64, into one bool for each voxel, (B,512)."""
    return np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, bitorder="little").view(bool)


@kernel
def spread_in_block(free, reached):
    """Fill one block until nothing changes; free and reached are its (8,) words."""
    changed = True
    while changed:
        changed = False
        for sweep in range(2 * BLOCK):  # forth and back along x
            layer = sweep if sweep < BLOCK else 2 * BLOCK - 1 - sweep
            word, start = reached[layer], reached[layer]
            if layer > 0:
                word |= reached[layer - 1]
            if layer < BLOCK_LAST:
                word |= reached[layer + 1]
            word &= free[layer]
            while True:
                before = word
                word |= (word << Y_STEP) | (word >> Y_STEP) | ((word & ~Z_HIGH) << Z_STEP) | ((word & ~Z_LOW) >> Z_STEP)
                word &= free[layer]
                if word == before:
                    break
            if word != start:
                reached[layer] = word
                changed = True


@kernel
def leaving(words, layer, direction):
    """Return the bits that step from a block (8,) into `layer` of its neighbour; directions: -x, +x, -y, +y, -z, +z."""
    if direction == 0:
        return words[0] if layer == BLOCK_LAST else np.uint64(0)
    if direction == 1:
        return words[BLOCK_LAST] if layer == 0 else np.uint64(0)
    if direction == 2:
        return (words[layer] & Y_LOW) << Y_SPAN
    if direction == 3:
        return (words[layer] & Y_HIGH) >> Y_SPAN
    if direction == 4:
        return (words[layer] & Z_LOW) << Z_SPAN
    return (words[layer] & Z_HIGH) >> Z_SPAN


@kernel
def flood_fill(grid, rows, free, reached, empty):
    """Reach every free voxel that is connected to the border of the grid, or to a voxel that is already reached.

    Args:
        grid: G.
        rows: row of each block in `free` and `reached`, (G³,) int32, x slowest; -1 for a block that is not stored.
        free: voxels that may be entered, (B,8) uint64.
        reached: the seeds on entry, all of them free; the filled voxels on return, (B,8) uint64.
        empty: True for a block that is not stored and is reached, (G³,) bool; changed in place, like `reached`.
    """
    stack = np.empty(grid * grid * grid, np.int32)  # a block is on it at most once
    waiting = np.zeros(grid * grid * grid, np.bool_)
    size = 0
    for x in range(grid):
        for y in range(grid):
            for z in range(grid):
                block = (x * grid + y) * grid + z
                row = rows[block]
                if min(x, y, z) == 0 or max(x, y, z) == grid - 1:
                    if row < 0:
                        empty[block] = True
                    else:
                        for layer in range(BLOCK):
                            front = np.uint64(0)
                            if (x == 0 and layer == 0) or (x == grid - 1 and layer == BLOCK_LAST):
                                front = ~front
                            if y == 0:
                                front |= Y_LOW
                            if y == grid - 1:
                                front |= Y_HIGH
                            if z == 0:
                                front |= Z_LOW
                            if z == grid - 1:
                                front |= Z_HIGH
                            reached[row, layer] |= front & free[row, layer]
                found = empty[block] if row < 0 else False
                if row >= 0:
                    for layer in range(BLOCK):
                        found = found or reached[row, layer] != 0
                if found:
                    stack[size] = block
                    waiting[block] = True
                    size += 1
    words = np.empty(BLOCK, np.uint64)
    while size > 0:
        size -= 1
        block = stack[size]
        waiting[block] = False
        row = rows[block]
        if row < 0:
            words[:] = ~np.uint64(0)
        else:
            spread_in_block(free[row], reached[row])
            words[:] = reached[row]
        x, y, z = block // (grid * grid), block // grid % grid, block % grid
        for direction in range(6):
            nx = x + (direction == 1) - (direction == 0)
            ny = y + (direction == 3) - (direction == 2)
            nz = z + (direction == 5) - (direction == 4)
            if min(nx, ny, nz) < 0 or max(nx, ny, nz) >= grid:
                continue
            neighbor = (nx * grid + ny) * grid + nz
            entered = False
            if rows[neighbor] < 0:
                if not empty[neighbor]:
                    front = np.uint64(0)
                    for layer in range(BLOCK):
                        front |= leaving(words, layer, direction)
                    entered = front != 0
                    empty[neighbor] = entered
            else:
                target = rows[neighbor]
                for layer in range(BLOCK):
                    front = leaving(words, layer, direction) & free[target, layer] & ~reached[target, layer]
                    if front != 0:
                        reached[target, layer] |= front
                        entered = True
            if entered and not waiting[neighbor]:
                stack[size] = neighbor
                waiting[neighbor] = True
                size += 1
