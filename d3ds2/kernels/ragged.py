"""Rows cut into segments, and the segments that attention pairs with each other.

Sizes named in this file:
    S  segments, or those of queries      M  segments of keys      H  key/value heads
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .devices import on_triton

if TYPE_CHECKING:
    from .sliding_window import SlidingWindow


@dataclass(frozen=True, eq=False)
class Ragged:
    """A list of rows cut into consecutive segments: segment i is `ids[offsets[i] : offsets[i + 1]]`.

    Args:
        offsets: first place of each segment in the list and, last, the length of the list, (S + 1,) int32.
        total: an upper bound of the length of the list.
        ids: the list, int32; None where it is 0, 1, 2, …
        longest: an upper bound of the lengths of the segments, where the host knows one.
        known_lengths: the length of each segment, where the host knows them.
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
        """The length of each segment, on the host; unless they are known, the host waits for the device."""
        return self.offsets.diff().tolist() if self.known_lengths is None else self.known_lengths

    @cached_property
    def membership(self) -> Tensor:
        """One where a row lies in a segment, else zero: (S, total) float32, for a list without `ids`."""
        rows = torch.arange(self.total, dtype=torch.int32, device=self.offsets.device)
        segment_of_row = torch.searchsorted(self.offsets[1:], rows, right=True)
        return (torch.arange(len(self), device=self.offsets.device)[:, None] == segment_of_row).float()

    @cached_property
    def divisors(self) -> Tensor:
        """The length of each segment, but 1 if it is empty: (S, 1) int32. Sums divided by it are means."""
        return self.offsets.diff().clamp(min=1)[:, None]

    @cached_property
    def inverse(self) -> Tensor:
        """The place of each row in `ids`, which must be a permutation: (total,) long."""
        assert self.ids is not None  # the rows 0, 1, 2, … are in their places
        return self.ids.argsort()

    def tiles(self, size: int) -> tuple[Tensor, Tensor]:
        """Cut the segments into tiles of at most `size` rows, without waiting for the device.

        Return the first tile of each segment (S + 1,) and the segment of each tile, both int32. The host does not know
        the number of tiles, so it returns as many as there can be; those beyond the last belong to segment S.
        """
        if size not in self._tiles:
            capacity = self.total // size + len(self)
            if on_triton(self.offsets):
                from .ragged_triton import cut_triton

                self._tiles[size] = cut_triton(self.offsets, size, capacity)
            else:
                self._tiles[size] = cut_reference(self.offsets, size, capacity)
        return self._tiles[size]


def cut_reference(offsets: Tensor, size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Definition of `Ragged.tiles`: first tile of each segment (S + 1,), segment of each of `capacity` tiles; int32."""
    tiles = (offsets.diff() + (size - 1)) // size
    tile_offsets = torch.nn.functional.pad(tiles.cumsum(0), (1, 0)).int()
    numbers = torch.arange(capacity, dtype=torch.int32, device=offsets.device)
    return tile_offsets, torch.searchsorted(tile_offsets[1:], numbers, right=True, out_int32=True)


@dataclass(frozen=True, eq=False)
class AttentionSegments:
    """Segments of queries, and the segments of keys they attend to.

    Args:
        queries: S segments.
        keys: M segments.
        pairs: 0 where S = M, and segment i of the queries attends to segment i of the keys in every head. Otherwise
            S = H * M, and segment h * M + m of the queries attends to segment m of the keys in head h. Each query row
            then lies in up to `pairs` segments, and `queries.ids` numbers pairs as ragged_attention.py says.
    """

    queries: Ragged
    keys: Ragged
    pairs: int = 0


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The rows that each branch of spatial sparse attention pairs. They follow from the voxels alone.

    Args:
        samples: tokens of each sample.
        compressed: compressed tokens of each sample.
        blocks: tokens of each selection block.
        windows: tokens of each window, or one window that slides over the tokens; None without that branch.
        children: compressed tokens of each selection block.
        sample_blocks: first block of each sample and, last, the number of all blocks, (B + 1,) int32.
        max_blocks: largest number of blocks in a sample.
        block_order: the blocks of each sample, those with most compressed tokens first, (M,) int32; None where every
            block has exactly one.
        block_counts: number of blocks of each sample, on the host; only the definition reads it.
    """

    samples: Ragged
    compressed: Ragged
    blocks: Ragged
    windows: "Ragged | SlidingWindow | None"
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
