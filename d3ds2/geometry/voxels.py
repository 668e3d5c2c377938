"""The geometry of a packed batch of voxels, and everything that follows from geometry alone.

Features are plain tensors (N, C) whose rows follow `Voxels.coords`. Whatever depends on the coordinates alone (sample
offsets, selection blocks, windows, neighbours, coarser and finer grids, position embeddings) is computed once and kept
in `Voxels.tables`, where all layers, both guidance branches and all sampling steps find it; see `per_grid`.

Sizes named in this file:
    N  voxels, all samples packed      B  samples
    M  occupied blocks of 8³ voxels    W  occupied attention windows
"""

import weakref
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.device_constant import device_constant
from .neighbors import BLOCK, PLACE_BITS, child_neighbors, search_neighbors, sort_keys
from .per_grid import per_grid, per_grid_property
from .position_embedding import absolute_position_embedding
from .windows import Windows

PLACES = tuple((0, *place) for place in product(range(BLOCK), repeat=3))  # in a block, in their order
CHILDREN = tuple((0, *child) for child in product((0, 1), repeat=3))  # of a voxel, in their order
EMBEDDED_ROWS = 16384  # positions embedded at a time: temporaries take several times the memory of the result


@dataclass(frozen=True, eq=False)
class Voxels:
    """Occupied voxels of a batch, sorted by (sample, 8³ block, place in block), each lexicographically in x, y, z.

    Args:
        coords: (N, 4) int32 rows [batch, x, y, z]. `Voxels.sort` takes unsorted ones.
        resolution: voxels along an edge of the grid.
        batch_size: number of samples B; some may be empty.
        tables: results known beforehand, under their `per_grid.key`. Results computed later are added.
        check: False for coords that are sorted by construction. The checks make the host wait for the device.

    Raises:
        ValueError: for a wrong shape or dtype, coordinates outside the grid, or rows that are out of order or repeated.
    """

    coords: Tensor
    resolution: int
    batch_size: int
    tables: dict = field(default_factory=dict, repr=False)
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if not check:
            return
        _check_coords(self.coords, self.resolution, self.batch_size)
        if not (self._keys.diff() > 0).all():
            raise ValueError("expected coords sorted by sample, block and place, without repeats; use Voxels.sort")

    @classmethod
    def sort(cls, coords: Tensor, resolution: int, batch_size: int | None = None) -> tuple["Voxels", Tensor]:
        """Sort coordinates (N, 4) of any integer dtype.

        Returns:
            The voxels, and `order` (N,) long with coords[order] == voxels.coords.

        Raises:
            ValueError: for a wrong shape, or coordinates outside the grid or repeated.
        """
        coords = coords.int()
        if batch_size is None:
            batch_size = int(coords[:, 0].max()) + 1 if len(coords) else 1
        _check_coords(coords, resolution, batch_size)
        keys, order = sort_keys(coords, resolution).sort()
        if (keys.diff() == 0).any():
            raise ValueError("expected each voxel once, got duplicate coords")
        return cls(coords[order], resolution, batch_size, check=False), order

    @classmethod
    def cat(cls, parts: list["Voxels"]) -> "Voxels":
        """Return one batch of the samples of all parts, in order. Raises ValueError unless all have one resolution."""
        if len({part.resolution for part in parts}) != 1:
            raise ValueError(f"expected parts of one resolution, got {[part.resolution for part in parts]}")
        first_samples = [sum(p.batch_size for p in parts[:i]) for i in range(len(parts))]
        shifted = [p.coords + p.coords.new_tensor([b, 0, 0, 0]) for p, b in zip(parts, first_samples, strict=True)]
        return cls(torch.cat(shifted), parts[0].resolution, sum(p.batch_size for p in parts), check=False)

    @classmethod
    def of_blocks(cls, block_coords: Tensor, resolution: int, batch_size: int) -> "Voxels":
        """Return all voxels of whole blocks.

        Args:
            block_coords: (M, 4) int32 [batch, x, y, z] in blocks, lexicographic and without repeats; not checked.
            resolution: voxels along an edge of the grid.
            batch_size: number of samples.
        """
        offset = device_constant(PLACES, block_coords.device)  # (512, 4)
        corners = block_coords * device_constant((1, BLOCK, BLOCK, BLOCK), block_coords.device)
        coords = (corners[:, None] + offset).flatten(0, 1)
        starts = torch.arange(len(block_coords) + 1, dtype=torch.int32, device=block_coords.device) * BLOCK**3
        tables = {Voxels.block_coords.key(): block_coords, Voxels.block_offsets.key(): starts}
        return cls(coords, resolution, batch_size, tables, check=False)

    @classmethod
    def above(cls, coords: Tensor, counts: list[list[int]], coarsest: "Voxels") -> "Voxels":
        """Return voxels over a known grid, so that coarsening them by 2 repeatedly never waits for the device.

        Args:
            coords: (N, 4) int32, sorted and without repeats; not checked.
            counts: voxels of each sample, in this grid and in those between it and `coarsest`, finest first.
            coarsest: the grid that coarsening by 2, `len(counts)` times, leads to; each of its voxels has some of
                these.
        """
        tables = _known_grids(counts, coarsest)
        return cls(coords, coarsest.resolution << len(counts), coarsest.batch_size, tables, check=False)

    def prepared(self) -> "Voxels":
        """Return these voxels with the tables that are best made on a CPU, before `map` moves them to a device.

        These are the neighbours, and the windows of 8 voxels with shifts 0 and 4, whose lengths the host needs.
        """
        tables = {
            Voxels.counts.key(): self.counts,
            Voxels.cu_seqlens.key(): self.cu_seqlens,
            Voxels.block_offsets.key(): self.block_offsets,
            Voxels.neighbors.key(): self.neighbors,
            Voxels._keys.key(): self._keys,
            **{Voxels.windows.key(shift): self.windows(shift) for shift in (0, BLOCK // 2)},
        }
        return Voxels(self.coords, self.resolution, self.batch_size, tables, check=False)

    def map(self, move: Callable[[Tensor], Tensor]) -> "Voxels":
        """Return prepared voxels with all tensors moved."""
        coords = move(self.coords)
        tables = {}
        for key, table in self.tables.items():  # other tables are left out, and computed again if needed
            if isinstance(table, Tensor):
                tables[key] = move(table)
            elif isinstance(table, Windows):
                tables[key] = table.map(move)
            elif isinstance(table, list):
                tables[key] = table  # counts, which stay on the host
        return Voxels(coords, self.resolution, self.batch_size, tables, check=False)

    def pin_memory(self) -> "Voxels":
        """Return the same voxels in pinned memory; a DataLoader calls this."""
        return self.map(Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def device(self) -> torch.device:
        return self.coords.device

    def to(self, device: torch.device | str) -> "Voxels":
        if torch.device(device) == self.device:
            return self
        return Voxels(self.coords.to(device), self.resolution, self.batch_size, check=False)

    @per_grid
    def repeat(self, times: int) -> "Voxels":
        """Return the whole batch, repeated `times` times, for both guidance branches in one pass."""
        return Voxels.cat([self] * times)

    def sample(self, index: int) -> "Voxels":
        """Return sample `index` as a batch of one."""
        first = sum(self.counts[:index])
        coords = self.coords[first : first + self.counts[index]] - self.coords.new_tensor([index, 0, 0, 0])
        return Voxels(coords, self.resolution, 1, check=False)

    # --- samples

    @per_grid_property
    def batch_index(self) -> Tensor:
        """Sample of each voxel, (N,) long."""
        return self.coords[:, 0].long()

    @per_grid_property
    def cu_seqlens(self) -> Tensor:
        """First row of each sample and, last, N: (B+1,) int32."""
        return _first_of_samples(self.coords, self.batch_size)

    @per_grid_property
    def counts(self) -> list[int]:
        """Voxels of each sample, on the host."""
        return self.cu_seqlens.diff().tolist()

    # --- selection blocks

    @per_grid_property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of the occupied blocks (M,), the block of each voxel (N,), the voxels in each block (M,): all long."""
        return torch.unique_consecutive(self._keys >> PLACE_BITS, return_inverse=True, return_counts=True)

    @per_grid_property
    def block_of_token(self) -> Tensor:
        """Block of each voxel, (N,) long, numbered through the occupied blocks of the whole batch."""
        return self._blocks[1]

    @per_grid_property
    def block_offsets(self) -> Tensor:
        """First row of each block and, last, N: (M+1,) int32."""
        return _offsets(self._blocks[2])

    @per_grid_property
    def block_coords(self) -> Tensor:
        """The occupied blocks, (M, 4) int32 [batch, x, y, z] in units of 8 voxels, lexicographic."""
        first_rows = self.coords[self.block_offsets[:-1].long()]
        return torch.cat([first_rows[:, :1], first_rows[:, 1:] // BLOCK], dim=1)

    @per_grid_property
    def block_cu_seqlens(self) -> Tensor:
        """First block of each sample and, last, M: (B+1,) int32."""
        return _first_of_samples(self.block_coords, self.batch_size)

    @per_grid_property
    def block_counts(self) -> list[int]:
        """Blocks of each sample, on the host."""
        return self.block_cu_seqlens.diff().tolist()

    # --- neighbours, coarser and finer grids

    @per_grid_property
    def neighbors(self) -> Tensor:
        """Rows of the 27 neighbours of each voxel, (27, N) int32; N where there is none.

        Row k = 9 (dx+1) + 3 (dy+1) + (dz+1) is for the voxels at coords + (dx, dy, dz); row 13 is the voxel itself.
        """
        if self._subdivided is not None and (coarse := self._subdivided()) is not None:
            return child_neighbors(coarse.neighbors, coarse.child_order)
        if Voxels.coarsen.key(2) in self.tables:
            return child_neighbors(self.coarsen(2)[0].neighbors, self.slots)
        return search_neighbors(self.coords, self._keys, self.resolution)

    @per_grid_property
    def slots(self) -> Tensor:
        """8 n + 4 i + 2 j + k for the voxel that is child (i, j, k) of voxel n of `coarsen(2)`: (N,) long."""
        x, y, z = (self.coords[:, 1:] & 1).unbind(1)
        return 8 * self.coarsen(2)[1] + (x * 4 + y * 2 + z)

    @per_grid
    def coarsen(self, factor: int) -> tuple["Voxels", Tensor]:
        """Pool `factor`³ voxels into one.

        Returns:
            The voxels at resolution / factor, and `parent` (N,) long: the row there of each voxel here.

        Raises:
            ValueError: if `factor` does not divide the resolution.
        """
        if self.resolution % factor:
            raise ValueError(f"expected a factor that divides the resolution {self.resolution}, got {factor}")
        resolution = self.resolution // factor
        coords = self.coords // device_constant((1, factor, factor, factor), self.device)
        keys = sort_keys(coords, resolution)
        known = self._coarser_grids if factor == 2 else None
        if known is not None and not known.counts:
            return known.coarsest, torch.searchsorted(known.coarsest._keys, keys)
        keys, order = keys.sort()
        rank = (keys.diff(prepend=keys[:1]) > 0).cumsum(0)  # of the coarse voxel, in sorted order
        N = sum(known.counts[0]) if known is not None else int(rank[-1]) + 1 if len(rank) else 0
        parent = torch.empty_like(rank).scatter_(0, order, rank)
        child = rank.new_empty(N).scatter_(0, rank, order)  # a child of each coarse voxel
        coords = coords.index_select(0, child)
        tables = {} if known is None else _known_grids(*known)
        tables[Voxels._keys.key()] = rank.new_empty(N).scatter_(0, rank, keys)
        return Voxels(coords, resolution, self.batch_size, tables, check=False), parent

    @per_grid
    def coarse_counts(self, factor: int) -> Tensor:
        """Return how many of these voxels lie in each voxel of `coarsen(factor)`: (its rows,) long."""
        coarse, parent = self.coarsen(factor)
        return parent.new_zeros(len(coarse)).scatter_add_(0, parent, torch.ones_like(parent))

    @per_grid
    def subdivide(self) -> tuple["Voxels", Tensor]:
        """Split every voxel into its eight children.

        Returns:
            The voxels at twice the resolution, and `parent` (8N,) long: the row here of each voxel there.
        """
        # the neighbours there follow from those here; a weak reference, since these voxels keep the finer ones
        tables = {Voxels._subdivided.key(): weakref.ref(self)}
        coords = self._children[self.child_order]
        fine = Voxels(coords, 2 * self.resolution, self.batch_size, tables, check=False)
        return fine, self.child_order // 8

    @per_grid_property
    def child_order(self) -> Tensor:
        """All children, sorted as `subdivide()[0]`: (8N,) long, 8 n + 4 i + 2 j + k for child (i, j, k) of voxel n.

        Features (8N, C) in rows 8 n + child are sorted by `x[child_order]`.
        """
        first = sort_keys(self.coords * device_constant((1, 2, 2, 2), self.device), 2 * self.resolution)
        places = tuple((i * BLOCK + j) * BLOCK + k for _, i, j, k in CHILDREN)
        child = device_constant(places, self.device)
        return (first[:, None] + child).flatten().argsort()  # the children of a voxel lie in one block

    @property
    def _children(self) -> Tensor:
        """Coordinates (8N, 4) of all children, row 8 n + child."""
        offset = device_constant(CHILDREN, self.device)  # (8, 4)
        return (self.coords[:, None] * device_constant((1, 2, 2, 2), self.device) + offset).flatten(0, 1)

    @per_grid_property
    def _coarser_grids(self) -> "_CoarserGrids | None":
        """The grids that coarsening by 2 leads to, if `above` was given them."""
        return None

    @per_grid_property
    def _subdivided(self) -> "weakref.ref[Voxels] | None":
        """A reference to the grid whose `subdivide` made this one; None for other voxels."""
        return None

    # --- attention windows and positions

    @per_grid
    def windows(self, shift: int, size: int = BLOCK) -> Windows:
        """Return cubic windows of `size` voxels: voxels of a sample with equal (xyz + shift) // size share one."""
        if size == BLOCK and shift % BLOCK == 0:
            return Windows(None, self.block_offsets, self.block_offsets.diff().tolist())
        per_edge = (self.resolution + shift) // size + 1
        x, y, z = ((self.coords[:, 1:].long() + shift) // size).unbind(1)
        key = ((self.batch_index * per_edge + x) * per_edge + y) * per_edge + z
        key, order = key.sort(stable=True)
        lengths = torch.unique_consecutive(key, return_counts=True)[1]
        return Windows(order, _offsets(lengths), lengths.tolist())

    @per_grid
    def position_embedding(self, channels: int, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `absolute_position_embedding` of xyz · factor, (N, channels), rounded to dtype."""
        slices = self.coords[:, 1:].split(EMBEDDED_ROWS)
        return torch.cat([absolute_position_embedding(xyz.float() * factor, channels).to(dtype) for xyz in slices])

    @per_grid_property
    def _keys(self) -> Tensor:
        return sort_keys(self.coords, self.resolution)


class _CoarserGrids(NamedTuple):
    """The grids that coarsening by 2, again and again, leads to."""

    counts: list[list[int]]  # voxels of each sample, in the grids before `coarsest`, finest first
    coarsest: Voxels


def _check_coords(coords: Tensor, resolution: int, batch_size: int) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
        raise ValueError(f"expected coords (N, 4) int32, got {tuple(coords.shape)} {coords.dtype}")
    if len(coords):
        low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
        if min(low) < 0 or high[0] >= batch_size or max(high[1:]) >= resolution:
            raise ValueError(
                f"expected coords [batch, x, y, z] below [{batch_size}, {resolution}, {resolution}, {resolution}], "
                f"got a range of {low} to {high}"
            )


def _known_grids(counts: list[list[int]], coarsest: Voxels) -> dict:
    """Return the tables of voxels over a known grid; arguments as for `Voxels.above`."""
    return {Voxels.counts.key(): counts[0], Voxels._coarser_grids.key(): _CoarserGrids(counts[1:], coarsest)}


def _first_of_samples(coords: Tensor, batch_size: int) -> Tensor:
    """First row of each sample in sorted coords and, last, their number: (B+1,) int32."""
    samples = torch.arange(batch_size + 1, dtype=coords.dtype, device=coords.device)
    return torch.searchsorted(coords[:, 0].contiguous(), samples, out_int32=True)


def _offsets(counts: Tensor) -> Tensor:
    """Return 0 and the running sums of counts, int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
