"""Rows cut into segments: which queries a kernel of attention pairs with which keys.

Sizes named in this file:
    S  runs of queries      M  runs of keys      H  key/value heads
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .devices import on_triton


@dataclass(frozen=True, eq=False)
class Ragged:
    """Consecutive runs of a list of rows: run i is `ids[offsets[i] : offsets[i + 1]]`.

    `offsets` is (S + 1,) int32, `total` bounds the length of the list from above, and `ids` (int32) is None where the
    list is 0, 1, 2, …; `longest` is the length of the longest run, where it is known on the host.
    `known_lengths` are the lengths of all runs, where the host knows them.
    """

    offsets: Tensor
    total: int
    ids: Tensor | None = None
    longest: int | None = None
    known_lengths: list[int] | None = None
    _tiles: dict = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def lengths(self) -> list[int]:
        """The rows of each segment, on the host; unless they are known, the host waits for the device."""
        return self.offsets.diff().tolist() if self.known_lengths is None else self.known_lengths

    @cached_property
    def membership(self) -> Tensor:
        """One where a row belongs to a segment, else zero: (S, total) float32, for rows 0, 1, 2, … without `ids`."""
        rows = torch.arange(self.total, dtype=torch.int32, device=self.offsets.device)
        segment_of_row = torch.searchsorted(self.offsets[1:], rows, right=True)
        return (torch.arange(len(self), device=self.offsets.device)[:, None] == segment_of_row).float()

    @cached_property
    def divisors(self) -> Tensor:
        """The length of each segment, 1 where it is empty: (S, 1) int32, to make means of sums."""
        return self.offsets.diff().clamp(min=1)[:, None]

    @cached_property
    def inverse(self) -> Tensor:
        """The position of each row in `ids`, (N,) long."""
        assert self.ids is not None  # the rows 0, 1, 2, … are where they belong
        return self.ids.argsort()

    def tiles(self, size: int) -> tuple[Tensor, Tensor]:
        """Cut the runs into tiles of at most `size`, without asking the device how many there are.

        Returns the first tile of each run (S + 1,) and the run of each tile, both int32; there are as many tiles as
        there may be at most, and those beyond the last have run S.
        """
        if size not in self._tiles:
            capacity = self.total // size + len(self)
            if on_triton(self.offsets):
                from .ragged_triton import cut_triton

                self._tiles[size] = cut_triton(self.offsets, size, capacity)
            else:
                self._tiles[size] = cut(self.offsets, size, capacity)
        return self._tiles[size]


def cut(offsets: Tensor, size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Definition of `Ragged.tiles`: first tile of each run (S + 1,), run of each of `capacity` tiles, both int32."""
    tiles = (offsets.diff() + (size - 1)) // size
    tile_offsets = torch.nn.functional.pad(tiles.cumsum(0), (1, 0)).int()
    numbers = torch.arange(capacity, dtype=torch.int32, device=offsets.device)
    return tile_offsets, torch.searchsorted(tile_offsets[1:], numbers, right=True, out_int32=True)


@dataclass(frozen=True, eq=False)
class AttentionSegments:
    """Lists of query rows and the runs of keys they attend to: S runs of `queries` and M of `keys`.

    S = M, or H * M where `pairs` is not 0.
    """

    queries: Ragged
    keys: Ragged
    pairs: int = 0


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The rows that the three branches of spatial sparse attention pair; they follow from the voxels alone.

    Args:
        samples: tokens of each sample.
        compressed: compressed tokens of each sample.
        blocks: tokens of each selection block.
        windows: tokens of each window.
        children: compressed tokens of each selection block.
        sample_blocks: first block of each sample and, last, their number, (B + 1,) int32.
        max_blocks: most blocks in a sample.
        block_order: the blocks of each sample, first those with most compressed tokens, (M,) int32; None where every
            block has one.
        block_counts: blocks of each sample, on the host; only the definition reads them.
    """

    samples: Ragged
    compressed: Ragged
    blocks: Ragged
    windows: Ragged
    children: Ragged
    sample_blocks: Tensor
    max_blocks: int
    block_order: Tensor | None = None
    block_counts: list[int] | None = None

    @cached_property
    def block_of_compressed(self) -> Tensor:
        """The selection block of each compressed token, (Nc,) long."""
        children = self.children
        numbers = torch.arange(len(children), device=children.offsets.device)
        blocks = torch.repeat_interleave(numbers, children.offsets.diff())
        return blocks if children.ids is None else blocks[children.inverse]
