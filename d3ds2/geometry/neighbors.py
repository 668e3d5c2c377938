"""Tables of the 27 neighbours of voxels, which are sorted as `Voxels.coords`.

Row k = 9 (dx+1) + 3 (dy+1) + (dz+1) of a table (27, N) int32 holds the rows of the voxels at coords + (dx, dy, dz), and
N where there is none; row 13 is the voxel itself.

Sizes named in this file:
    N  voxels      Nc  voxels of the grid of half the resolution      K  offsets at a time
"""

from itertools import product

import torch
from torch import Tensor

from ..kernels.device_constant import device_constant
from .voxel_keys import sort_keys

SEARCHED = 1 << 22  # neighbours searched at a time: what one takes is some 150 bytes
OFFSETS = tuple(product((-1, 0, 1), repeat=3))


def _child_tables() -> tuple[tuple, tuple]:
    """Of the neighbour at each offset of each child of a cell: the offset of its cell, and which child it is there."""
    offset, which = [], []
    for steps in OFFSETS:
        places = [[c + d for c, d in zip(child, steps, strict=True)] for child in product((0, 1), repeat=3)]
        offset.append(tuple(9 * (x // 2 + 1) + 3 * (y // 2 + 1) + z // 2 + 1 for x, y, z in places))
        which.append(tuple(4 * (x % 2) + 2 * (y % 2) + z % 2 for x, y, z in places))
    return tuple(offset), tuple(which)


CELL_OFFSET, CHILD = _child_tables()  # (27, 8) each


def search_neighbors(coords: Tensor, keys: Tensor, resolution: int) -> Tensor:
    """By binary search among the `sort_keys` (N,) of coords (N, 4): (27, N) int32."""
    N = len(coords)
    table = torch.full((27, N), N, dtype=torch.int32, device=coords.device)
    rows = torch.arange(N, dtype=torch.int32, device=coords.device)
    table[13] = rows
    if N == 0:
        return table
    offsets = device_constant(tuple((0, *offset) for offset in OFFSETS[:13]), coords.device)  # (13, 4)
    at_a_time = max(1, SEARCHED // N)
    for first in range(0, 13, at_a_time):
        part = slice(first, min(13, first + at_a_time))
        wanted = coords + offsets[part, None]  # (K, N, 4)
        inside = ((wanted >= 0) & (wanted < resolution))[..., 1:].all(-1)
        wanted = sort_keys(wanted.clamp_(min=0).flatten(0, 1), resolution).view(-1, N)
        found = torch.searchsorted(keys, wanted, out_int32=True).clamp_(max=N - 1)
        hit = inside & (keys[found] == wanted)
        table[part] = found = found.masked_fill_(~hit, N)
        # being neighbours is mutual: the voxel found has this one at the opposite offset
        opposite = torch.full((len(found), N + 1), N, dtype=torch.int32, device=coords.device)
        opposite.scatter_(1, found.long(), rows.expand(len(found), N))
        table[27 - part.stop : 27 - part.start] = opposite[:, :N].flip(0)
    return table


def child_neighbors(coarse: Tensor, slots: Tensor) -> Tensor:
    """By look-ups in the table of the grid of half the resolution, much faster than a search.

    Args:
        coarse: that table, (27, Nc).
        slots: 8 · parent + 4 i + 2 j + k of each voxel, the child i, j, k of `parent`, (N,) long.

    Returns:
        (27, N) int32.
    """
    N, slot_count = len(slots), 8 * coarse.shape[1]
    offset, child = (device_constant(table, slots.device) for table in (CELL_OFFSET, CHILD))
    rows = coarse.index_select(0, offset.flatten()).view(27, 8, -1) * 8 + child[..., None]  # (27, 8, Nc)
    rank = torch.full((slot_count + 8,), N, dtype=torch.int32, device=slots.device)
    rank[slots] = torch.arange(N, dtype=torch.int32, device=slots.device)
    ranks = rank.index_select(0, rows.flatten()).view_as(rows)
    return ranks.transpose(1, 2).flatten(1).index_select(1, slots)
