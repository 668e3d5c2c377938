"""The geometry of a packed batch of voxels, and everything that follows from geometry alone.

Features are plain tensors (N, C) whose rows follow `Voxels.coords`. What depends on the coordinates only (sample
offsets, selection blocks, windows, neighbour tables, coarser and finer grids, position embeddings) is computed once
here, kept, and shared by all layers, both guidance branches and all sampling steps.

Sizes named in this file:
    N  voxels, all samples packed      B  samples
    M  occupied blocks of 8³ voxels    W  occupied attention windows
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from ..kernels.device_constant import device_constant
from .neighbors import child_neighbors, search_neighbors
from .position_embedding import absolute_position_embedding
from .voxel_keys import BLOCK, sort_keys
from .windows import Windows

PLACES = tuple((0, *place) for place in product(range(BLOCK), repeat=3))  # in a block, in their order
EMBEDDED_ROWS = 16384  # positions embedded at a time


@dataclass(frozen=True, eq=False)
class Voxels:
    """Occupied voxels of a batch, sorted by (sample, 8³ block, place in block), each lexicographically in x, y, z.

    Args:
        coords: (N, 4) int32 rows [batch, x, y, z]. Unsorted ones go through `Voxels.sort`.
        resolution: voxels along an edge of the grid.
        batch_size: number of samples B; some may be empty.

    Raises:
        ValueError: for a wrong shape or dtype, coordinates outside the grid, rows out of order or given twice.
    """

    coords: Tensor
    resolution: int
    batch_size: int
    _cache: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_coords(self.coords, self.resolution, self.batch_size)
        if not (self._keys.diff() > 0).all():
            raise ValueError("expected coords sorted by sample, block and place, each once; sort with Voxels.sort")

    @classmethod
    def sort(cls, coords: Tensor, resolution: int, batch_size: int | None = None) -> tuple["Voxels", Tensor]:
        """Sort coordinates (N, 4) of any integer dtype; returns the voxels and `order` (N,): coords[order] = sorted."""
        coords = coords.int()
        if batch_size is None:
            batch_size = int(coords[:, 0].max()) + 1 if len(coords) else 1
        _check_coords(coords, resolution, batch_size)
        keys, order = sort_keys(coords, resolution).sort()
        if (keys.diff() == 0).any():
            raise ValueError("expected every voxel once, got duplicate coords")
        return cls._trusted(coords[order], resolution, batch_size), order

    @classmethod
    def cat(cls, parts: list["Voxels"]) -> "Voxels":
        """One batch of all samples of all parts, in order; the parts must share one resolution."""
        if len({part.resolution for part in parts}) != 1:
            raise ValueError(f"expected parts of one resolution, got {[part.resolution for part in parts]}")
        first_samples = [sum(p.batch_size for p in parts[:i]) for i in range(len(parts))]
        shifted = [p.coords + p.coords.new_tensor([b, 0, 0, 0]) for p, b in zip(parts, first_samples, strict=True)]
        return cls._trusted(torch.cat(shifted), parts[0].resolution, sum(p.batch_size for p in parts))

    @classmethod
    def _trusted(cls, coords: Tensor, resolution: int, batch_size: int) -> "Voxels":
        """Without the checks, for coords sorted by construction: they would cost a device synchronisation."""
        voxels = object.__new__(cls)
        voxels.__dict__.update(coords=coords, resolution=resolution, batch_size=batch_size, _cache={})
        return voxels

    @classmethod
    def of_blocks(cls, block_coords: Tensor, resolution: int, batch_size: int) -> "Voxels":
        """All 8³ voxels of blocks (M, 4) int32 [batch, x, y, z], which must be lexicographic, each once: no check."""
        offset = device_constant(PLACES, block_coords.device)  # (512, 4)
        corners = block_coords * device_constant((1, BLOCK, BLOCK, BLOCK), block_coords.device)
        voxels = cls._trusted((corners[:, None] + offset).flatten(0, 1), resolution, batch_size)
        starts = torch.arange(len(block_coords) + 1, dtype=torch.int32, device=block_coords.device) * BLOCK**3
        voxels.__dict__.update(block_coords=block_coords, block_offsets=starts)  # where they are cached
        return voxels

    @classmethod
    def above(cls, coords: Tensor, counts: list[list[int]], coarsest: "Voxels") -> "Voxels":
        """Voxels over a known grid: no check, and coarsening them by 2 again and again never waits for the device.

        Args:
            coords: (N, 4) int32, sorted, each once.
            counts: voxels of each sample, in this grid and in those between it and `coarsest`, finest first.
            coarsest: the grid `len(counts)` times coarsened by 2; each of its voxels has some of these.
        """
        voxels = cls._trusted(coords, coarsest.resolution << len(counts), coarsest.batch_size)
        voxels.__dict__["counts"] = counts[0]  # where they are cached
        voxels._cache["coarser"] = counts[1:], coarsest
        return voxels

    def prepared(self) -> "Voxels":
        """These voxels with what layers ask for that is made best on a CPU, before `map` moves all of it to a device.

        That is the neighbours, and the windows of 8 voxels with shifts 0 and 4, whose lengths belong to the host.
        """
        windows = {("windows", shift, BLOCK): self.windows(shift) for shift in (0, BLOCK // 2)}
        names = ("counts", "cu_seqlens", "block_offsets", "neighbors", "_keys")
        voxels = Voxels._trusted(self.coords, self.resolution, self.batch_size)
        voxels.__dict__.update({name: getattr(self, name) for name in names}, _cache=windows)
        return voxels

    def map(self, move: Callable[[Tensor], Tensor]) -> "Voxels":
        """Prepared voxels with all tensors moved."""
        voxels = object.__new__(Voxels)
        parts = {name: move(part) if isinstance(part, Tensor) else part for name, part in self.__dict__.items()}
        windows = {key: windows.map(move) for key, windows in self._cache.items()}
        voxels.__dict__.update(parts, _cache=windows)
        return voxels

    def pin_memory(self) -> "Voxels":
        """What a DataLoader calls."""
        return self.map(Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def device(self) -> torch.device:
        return self.coords.device

    def to(self, device: torch.device | str) -> "Voxels":
        if torch.device(device) == self.device:
            return self
        return Voxels._trusted(self.coords.to(device), self.resolution, self.batch_size)

    def repeat(self, times: int) -> "Voxels":
        """The whole batch, `times` over: both guidance branches in one pass."""
        return self.cached(("repeat", times), lambda: Voxels.cat([self] * times))

    def sample(self, index: int) -> "Voxels":
        """Sample `index` alone, as a batch of one."""
        first = sum(self.counts[:index])
        coords = self.coords[first : first + self.counts[index]] - self.coords.new_tensor([index, 0, 0, 0])
        return Voxels._trusted(coords, self.resolution, 1)

    # --- samples

    @cached_property
    def batch_index(self) -> Tensor:
        """Sample of each voxel, (N,) long."""
        return self.coords[:, 0].long()

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """First row of each sample and, last, N: (B+1,) int32."""
        return _first_of_samples(self.coords, self.batch_size)

    @cached_property
    def counts(self) -> list[int]:
        """Voxels of each sample, on the host."""
        return self.cu_seqlens.diff().tolist()

    # --- selection blocks

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, block_of_token, counts = torch.unique_consecutive(
            self._keys >> 9, return_inverse=True, return_counts=True
        )
        return keys, block_of_token, counts

    @cached_property
    def block_of_token(self) -> Tensor:
        """Block of each voxel, (N,) long: ids count the occupied blocks of the whole batch."""
        return self._blocks[1]

    @cached_property
    def block_offsets(self) -> Tensor:
        """First row of each block and, last, N: (M+1,) int32."""
        return _offsets(self._blocks[2])

    @cached_property
    def block_coords(self) -> Tensor:
        """Blocks as [batch, x, y, z] in units of 8 voxels, lexicographic, (M, 4) int32."""
        first_rows = self.coords[self.block_offsets[:-1].long()]
        return torch.cat([first_rows[:, :1], first_rows[:, 1:] // BLOCK], dim=1)

    @cached_property
    def block_cu_seqlens(self) -> Tensor:
        """First block of each sample and, last, M: (B+1,) int32."""
        return _first_of_samples(self.block_coords, self.batch_size)

    @cached_property
    def block_counts(self) -> list[int]:
        """Blocks of each sample, on the host."""
        return self.block_cu_seqlens.diff().tolist()

    # --- neighbours, coarser and finer grids

    @cached_property
    def neighbors(self) -> Tensor:
        """Rows of the 27 neighbours, (27, N) int32, N where there is none.

        Row k = 9 (dx+1) + 3 (dy+1) + (dz+1) holds the voxels at coords + (dx, dy, dz); row 13 is the voxel itself.
        """
        if (whole := self._cache.get("coarse", lambda: None)()) is not None:
            return child_neighbors(whole.neighbors, whole.child_order)
        if ("coarsen", 2) in self._cache:
            return child_neighbors(self.coarsen(2)[0].neighbors, self.slots)
        return search_neighbors(self.coords, self._keys, self.resolution)

    @cached_property
    def slots(self) -> Tensor:
        """8 n + 4 i + 2 j + k of each voxel, the child i, j, k of voxel n of `coarsen(2)`, (N,) long."""
        x, y, z = (self.coords[:, 1:] & 1).unbind(1)
        return 8 * self.coarsen(2)[1] + (x * 4 + y * 2 + z)

    def coarsen(self, factor: int) -> tuple["Voxels", Tensor]:
        """Pool `factor`³ voxels into one.

        Returns:
            The voxels at resolution / factor, and `parent` (N,) long: the row there of each voxel here.

        Raises:
            ValueError: if `factor` does not divide the resolution.
        """
        if self.resolution % factor:
            raise ValueError(f"expected a factor that divides the resolution {self.resolution}, got {factor}")
        return self.cached(("coarsen", factor), lambda: self._coarsen(factor))

    def _coarsen(self, factor: int) -> tuple["Voxels", Tensor]:
        resolution = self.resolution // factor
        coords = self.coords // device_constant((1, factor, factor, factor), self.device)
        keys = sort_keys(coords, resolution)
        counts, coarsest = self._cache.get("coarser", (None, None)) if factor == 2 else (None, None)
        if counts == []:
            return coarsest, torch.searchsorted(coarsest._keys, keys)
        keys, order = keys.sort()
        rank = (keys.diff(prepend=keys[:1]) > 0).cumsum(0)  # of the voxel there, in sorted order
        known = None if counts is None else sum(counts[0])
        N = known if known is not None else int(rank[-1]) + 1 if len(rank) else 0
        parent = torch.empty_like(rank).scatter_(0, order, rank)
        child = rank.new_empty(N).scatter_(0, rank, order)  # one of each voxel there
        coords = coords.index_select(0, child)
        if counts is not None:
            coarse = Voxels.above(coords, counts, coarsest)
        else:
            coarse = Voxels._trusted(coords, resolution, self.batch_size)
        coarse.__dict__["_keys"] = rank.new_empty(N).scatter_(0, rank, keys)  # where it is cached
        return coarse, parent

    def coarse_counts(self, factor: int) -> Tensor:
        """How many of these voxels lie in each voxel of `coarsen(factor)`, (rows there,) long."""
        coarse, parent = self.coarsen(factor)
        return self.cached(
            ("coarse counts", factor),
            lambda: parent.new_zeros(len(coarse)).scatter_add_(0, parent, torch.ones_like(parent)),
        )

    def subdivide(self) -> tuple["Voxels", Tensor]:
        """All eight children of every voxel, at twice the resolution, and `parent` (8N,) long: each one's row here."""
        return self.cached("subdivide", self._subdivide)

    def _subdivide(self) -> tuple["Voxels", Tensor]:
        fine = Voxels._trusted(self._children[self.child_order], 2 * self.resolution, self.batch_size)
        fine._cache["coarse"] = weakref.ref(self)  # its neighbours follow from ours; weak, for we hold the fine grid
        return fine, self.child_order // 8

    @cached_property
    def child_order(self) -> Tensor:
        """Row i of `subdivide()[0]` is child 4 i + 2 j + k = `child_order[i] % 8` of `child_order[i] // 8`, (8N,) long.

        So features (8N, C) in rows 8 n + child are sorted by `x[child_order]`.
        """
        first = sort_keys(self.coords * device_constant((1, 2, 2, 2), self.device), 2 * self.resolution)
        child = device_constant(tuple(64 * i + 8 * j + k for i, j, k in product((0, 1), repeat=3)), self.device)
        return (first[:, None] + child).flatten().argsort()  # the children of a voxel lie in one block

    @property
    def _children(self) -> Tensor:
        """Coordinates (8N, 4) of all children, row 8 n + child."""
        offset = device_constant(tuple((0, *child) for child in product((0, 1), repeat=3)), self.device)  # (8, 4)
        return (self.coords[:, None] * device_constant((1, 2, 2, 2), self.device) + offset).flatten(0, 1)

    # --- attention windows and positions

    def windows(self, shift: int, size: int = BLOCK) -> Windows:
        """Cubic windows of `size` voxels; voxels of one sample with equal (xyz + shift) // size share a window."""
        return self.cached(("windows", shift, size), lambda: self._windows(shift, size))

    def _windows(self, shift: int, size: int) -> Windows:
        if size == BLOCK and shift % BLOCK == 0:
            return Windows(None, self.block_offsets, self.block_offsets.diff().tolist())
        per_edge = (self.resolution + shift) // size + 1
        x, y, z = ((self.coords[:, 1:].long() + shift) // size).unbind(1)
        key = ((self.batch_index * per_edge + x) * per_edge + y) * per_edge + z
        key, order = key.sort(stable=True)
        lengths = torch.unique_consecutive(key, return_counts=True)[1]
        return Windows(order, _offsets(lengths), lengths.tolist())

    def position_embedding(self, channels: int, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`absolute_position_embedding` of xyz · factor, (N, channels), rounded to dtype."""
        return self.cached(("position", channels, factor, dtype), lambda: self._embed(channels, factor, dtype))

    def _embed(self, channels: int, factor: float, dtype: torch.dtype) -> Tensor:
        slices = self.coords[:, 1:].split(EMBEDDED_ROWS)  # what goes into an embedding is several times as large
        return torch.cat([absolute_position_embedding(xyz.float() * factor, channels).to(dtype) for xyz in slices])

    @cached_property
    def _keys(self) -> Tensor:
        return sort_keys(self.coords, self.resolution)

    def cached(self, key: tuple, make: Callable):
        """What `make` returns, made once: for what follows from the coordinates alone."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


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


def _first_of_samples(coords: Tensor, batch_size: int) -> Tensor:
    """First row of each sample in sorted coords and, last, their number: (B+1,) int32."""
    samples = torch.arange(batch_size + 1, dtype=coords.dtype, device=coords.device)
    return torch.searchsorted(coords[:, 0].contiguous(), samples, out_int32=True)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
