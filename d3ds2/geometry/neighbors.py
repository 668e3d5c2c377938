"""The order of voxels, and tables of their 27 neighbours.

Voxels are sorted by an integer key (`sort_keys`), that is by sample, 8³ block and place in the block.

A table of neighbours is (27, N) int32. Its row k = 9 (dx+1) + 3 (dy+1) + (dz+1) holds, for each voxel, the row of the
voxel at coords + (dx, dy, dz), or N where there is none. Row 13 is the voxel itself.

Sizes named in this file:
    N  voxels      Nc  voxels of the grid of half the resolution      K  offsets searched at a time
"""

from itertools import product

import torch
from torch import Tensor

from ..kernels.device_constant import device_constant

EDGE_BITS = 3
BLOCK = 1 << EDGE_BITS  # voxels per edge of a selection block (m_slc in the paper), and SDF voxels per edge of a latent
PLACE_BITS = 3 * EDGE_BITS  # low bits of a key: the place of a voxel in its block; the bits above number the blocks
SEARCH_CHUNK = 1 << 22  # neighbours searched at a time; each takes some 150 bytes
OFFSETS = tuple(product((-1, 0, 1), repeat=3))


def _child_tables() -> tuple[tuple, tuple]:
    """Return two tables (27, 8) that locate the neighbours of the 8 children of a cell, at each of the 27 offsets.

    The first table holds the offset k from the cell to the neighbour's cell. The second holds which child of that cell
    the neighbour is.
    """
    offset, which = [], []
    for steps in OFFSETS:
        places = [[c + d for c, d in zip(child, steps, strict=True)] for child in product((0, 1), repeat=3)]
        offset.append(tuple(9 * (x // 2 + 1) + 3 * (y // 2 + 1) + z // 2 + 1 for x, y, z in places))
        which.append(tuple(4 * (x % 2) + 2 * (y % 2) + z % 2 for x, y, z in places))
    return tuple(offset), tuple(which)


CELL_OFFSET, CHILD = _child_tables()


def sort_keys(coords: Tensor, resolution: int) -> Tensor:
    """Return the keys (N,) int64 that sort coords (N, 4) [batch, x, y, z] by sample, block and place in the block."""
    blocks_per_edge = -(-resolution // BLOCK)
    block, x, y, z = coords.long().unbind(1)
    for axis in (x, y, z):
        block = torch.add(axis >> EDGE_BITS, block, alpha=blocks_per_edge)  # shifts: CPUs divide int64 slowly
    last = BLOCK - 1
    place = torch.add(torch.add(z & last, y & last, alpha=BLOCK), x & last, alpha=BLOCK**2)
    return torch.add(place, block, alpha=BLOCK**3)


def search_neighbors(coords: Tensor, keys: Tensor, resolution: int) -> Tensor:
    """Find the neighbours by binary search.

    Args:
        coords: (N, 4) int32, sorted.
        keys: their `sort_keys` (N,).
        resolution: voxels along an edge of the grid.

    Returns:
        The table (27, N) int32.
    """
    N = len(coords)
    table = torch.full((27, N), N, dtype=torch.int32, device=coords.device)
    rows = torch.arange(N, dtype=torch.int32, device=coords.device)
    table[13] = rows
    if N == 0:
        return table
    offsets = device_constant(tuple((0, *offset) for offset in OFFSETS[:13]), coords.device)  # (13, 4)
    at_a_time = max(1, SEARCH_CHUNK // N)
    for first in range(0, 13, at_a_time):
        part = slice(first, min(13, first + at_a_time))
        wanted = coords + offsets[part, None]  # (K, N, 4)
        inside = ((wanted >= 0) & (wanted < resolution))[..., 1:].all(-1)
        wanted = sort_keys(wanted.clamp_(min=0).flatten(0, 1), resolution).view(-1, N)
        found = torch.searchsorted(keys, wanted, out_int32=True).clamp_(max=N - 1)
        hit = inside & (keys[found] == wanted)
        table[part] = found = found.masked_fill_(~hit, N)
        # neighbours come in pairs: the voxel found has this one at the opposite offset
        opposite = torch.full((len(found), N + 1), N, dtype=torch.int32, device=coords.device)
        opposite.scatter_(1, found.long(), rows.expand(len(found), N))
        table[27 - part.stop : 27 - part.start] = opposite[:, :N].flip(0)
    return table


def child_neighbors(coarse: Tensor, slots: Tensor) -> Tensor:
    """Look up the neighbours in the table of the grid of half the resolution, which is much faster than a search.

    Args:
        coarse: the table of that grid, (27, Nc).
        slots: (N,) long, 8 · parent + 4 i + 2 j + k for the voxel that is child (i, j, k) of `parent`.

    Returns:
        The table (27, N) int32.
    """
    N, slot_count = len(slots), 8 * coarse.shape[1]
    offset, child = (device_constant(table, slots.device) for table in (CELL_OFFSET, CHILD))
    rows = coarse.index_select(0, offset.flatten()).view(27, 8, -1) * 8 + child[..., None]  # (27, 8, Nc)
    rank = torch.full((slot_count + 8,), N, dtype=torch.int32, device=slots.device)
    rank[slots] = torch.arange(N, dtype=torch.int32, device=slots.device)
    ranks = rank.index_select(0, rows.flatten()).view_as(rows)
    return ranks.transpose(1, 2).flatten(1).index_select(1, slots)
