"""How the attention kernels cut their work."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tile:
    """The work of one program of a kernel.

    Args:
        rows, keys: query rows times their query heads, and keys, at a time.
        warps, stages: warps of a program, and stages of its pipeline.
        splits: parts into which the kernel of dk and dv cuts the queries of a segment.
        registers: most registers of a thread.
    """

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    splits: int = 1
    registers: int | None = None


class AttentionTiles(NamedTuple):
    """The tiles of the forward kernel, of the kernel of dq, and of that of dk and dv."""

    forward: Tile
    dq: Tile
    dkdv: Tile
