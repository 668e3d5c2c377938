"""Batches of training data. A batch follows from (seed, step), so a resumed run sees the same batches.

A dataset is indexed by the step and returns the whole, packed batch of that step; `load_batches` runs it in worker
processes and moves the batches to the device. `sizes` and `load` serve `training.data.parts`: the tokens of each sample
of a step, (B,), and the batch of some of its samples. The files are those of `training.data.shape_files`.

Shapes are also turned and mirrored (see `symmetry`); the picture of a mirrored shape is flipped.

Sizes: M blocks = tokens of a batch, B samples, G = R/8 blocks per edge, C latent channels, S pixels per edge.
"""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d3ds2.geometry.voxels import BLOCK, PLACES, Voxels
from d3ds2.kernels.device_constant import device_constant
from training.data.shape_files import StoredShape, latent_path, list_shapes, load_shape, read_arrays, shape_path
from training.data.symmetry import transform_voxels
from training.data.views import Views


class ShapeBatch(NamedTuple):
    """SDF blocks of B shapes, sorted by (sample, x, y, z)."""

    block_coords: Tensor  # (M, 4) int32 [batch, x, y, z] at R/8
    sdf: Tensor  # (M, 8, 8, 8) fp16 in [-1, 1]
    sharp: Tensor  # (M, 8, 8, 8) bool
    active: Tensor  # (N,) int32: indices of the voxels inside the band, |sdf| < 1, among all 512 M
    counts: list[list[int]]  # of each sample: active voxels, and voxels at R/2 and R/4 that hold one
    latent_voxels: Voxels  # those of block_coords, with their tables prepared
    resolution: int  # R
    batch_size: int


class ViewBatch(NamedTuple):
    """Pictures of B shapes, and the shapes they show."""

    shapes: Tensor  # (B,) int64
    symmetries: Tensor  # (B,) int64
    images: Tensor  # (B, 4, S, S) uint8: the object on white, and its mask


class LatentBatch(NamedTuple):
    """Latents of B shapes, each with a picture; tokens in the order of `Voxels`."""

    coords: Tensor  # (M, 4) int32 [batch, x, y, z] at R/8
    mean: Tensor  # (M, C) fp16
    logvar: Tensor  # (M, C) fp16
    images: Tensor  # (B, 4, S, S) uint8


EVERY = slice(None)  # all samples of a step


# --- which shapes a step sees


def draw(*key: int) -> np.random.Generator:
    """Return a random generator that follows from the key alone, such as (seed, step)."""
    return np.random.default_rng(key)


class BatchPlan:
    """The items of each step: one random permutation of all items after another, cut into batches.

    A batch ends at `batch_size` items, or before an item that would raise it above `max_tokens`. Larger items are left
    out; `kept` lists the others.

    Raises:
        ValueError: every item is larger than `max_tokens`.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, max_tokens: int, seed: int):
        self.tokens, self.batch_size, self.max_tokens, self.seed = tokens, batch_size, max_tokens, seed
        self.kept = np.flatnonzero(tokens <= max_tokens)
        if len(self.kept) == 0:
            raise ValueError(f"expected items of at most {max_tokens} tokens, the smallest has {tokens.min()}")
        self._restart()

    def _restart(self) -> None:
        self._epoch, self._first_step, self._batches, self._open = 0, 0, [], []

    def __getitem__(self, step: int) -> np.ndarray:
        """The items of a step, (number,) int64."""
        if step < self._first_step:
            self._restart()
        while step >= self._first_step + len(self._batches):
            self._first_step += len(self._batches)  # forget the previous epoch: steps mostly go forward
            self._batches = list(self._cut(draw(self.seed, self._epoch).permutation(self.kept).tolist()))
            self._epoch += 1
        return np.array(self._batches[step - self._first_step])

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each item of a step, (number,) int64."""
        return self.tokens[self[step]]

    def _cut(self, items: list[int]) -> Iterator[list[int]]:
        """Yield the finished batches; the last, unfinished one stays in `_open` and is filled by the next epoch."""
        batch, size = self._open, int(self.tokens[self._open].sum()) if self._open else 0
        for item in items:
            tokens = int(self.tokens[item])
            if len(batch) == self.batch_size or size + tokens > self.max_tokens:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += tokens
        self._open = batch


class ResolutionPlan:
    """The resolution of each step, drawn uniformly, and the number of earlier steps with the same one."""

    CHUNK = 4096  # steps drawn at once

    def __init__(self, resolutions: tuple[int, ...], seed: int):
        self.resolutions, self.seed, self._drawn = resolutions, seed, np.zeros(0, dtype=np.int64)

    def __getitem__(self, step: int) -> tuple[int, int]:
        while step >= len(self._drawn):
            rng = draw(self.seed, len(self._drawn) // self.CHUNK, 1)
            self._drawn = np.concatenate([self._drawn, rng.integers(len(self.resolutions), size=self.CHUNK)])
        choice = self._drawn[step]
        return self.resolutions[choice], int((self._drawn[:step] == choice).sum())


# --- datasets


def pack_shapes(shapes: list[StoredShape], resolution: int) -> ShapeBatch:
    """Pack loaded shapes into a batch.

    Raises:
        ValueError: a block is out of order, repeated, outside the grid or without an active voxel.
    """
    blocks, sdf, sharp = zip(*shapes, strict=True)
    B, coords = len(shapes), _with_batch(blocks)
    place = np.ravel_multi_index(coords.numpy().T, (B, *[resolution // BLOCK] * 3))  # ValueError outside the grid
    if not (np.diff(place) > 0).all():
        raise ValueError("expected different blocks in lexicographic order")
    latent_voxels = Voxels.sort(coords, resolution // BLOCK, B)[0]
    values = np.concatenate(sdf)
    occupied = values.view(np.uint16) & 0x7FFF < 0x3C00  # |sdf| < 1 in fp16, without numpy's slow conversion
    active = torch.from_numpy(np.flatnonzero(occupied).astype(np.int32))
    counts = []
    for _ in range(3):
        per_block = occupied.reshape(len(coords), -1).sum(1)
        counts.append(np.bincount(coords[:, 0], per_block, minlength=B).astype(int).tolist())
        for axis in (1, 2, 3):
            even, odd = (occupied[(slice(None),) * axis + (slice(i, None, 2),)] for i in (0, 1))
            occupied = even | odd
    if not occupied.all():
        raise ValueError("expected an active voxel in every block")
    return ShapeBatch(
        coords, torch.from_numpy(values), _cat(sharp), active, counts, latent_voxels.prepared(), resolution, B
    )


def active_voxels(batch: ShapeBatch) -> tuple[Tensor, Voxels]:
    """Return the encoder's input: the SDF (N, 1) float32 of the voxels inside the band, and these voxels at R (eq. 1).

    Waits for nothing on the device: all sizes are those that `pack_shapes` counted.
    """
    block, place = batch.active // BLOCK**3, batch.active % BLOCK**3
    corners = batch.block_coords * device_constant((1, BLOCK, BLOCK, BLOCK), block.device)
    places = device_constant(PLACES, block.device)  # (512, 4)
    # gathered as columns: torch gathers rows as narrow as these slowly on a GPU
    coords = (corners.t().index_select(1, block) + places.t().index_select(1, place)).t()  # (N, 4)
    sdf = batch.sdf.flatten().index_select(0, batch.active).float()[:, None]
    return sdf, Voxels.above(coords, batch.counts, batch.latent_voxels)


class Shapes(Dataset):
    """SDFs for the VAE: `shapes[step]` is a `ShapeBatch` of one of the resolutions."""

    def __init__(
        self,
        data_dir: str,
        split: str,
        resolutions: tuple[int, ...],
        batch_size: int,
        max_tokens: int,
        seed: int,
        symmetries: tuple[int, ...] = (0,),
    ):
        self.data_dir, self.symmetries = data_dir, symmetries
        self.resolution_of_step = ResolutionPlan(resolutions, seed)
        self.names, self.plans = {}, {}
        for R in resolutions:
            self.names[R], tokens = list_shapes(data_dir, split, R)
            self.plans[R] = BatchPlan(tokens.repeat(len(symmetries)), batch_size, max_tokens, seed)

    def __getitem__(self, step: int) -> ShapeBatch:
        return self.load(step, EVERY)

    def sizes(self, step: int) -> np.ndarray:
        R, index = self.resolution_of_step[step]
        return self.plans[R].sizes(index)

    def load(self, step: int, chosen: np.ndarray | slice) -> ShapeBatch:
        R, index = self.resolution_of_step[step]
        shapes = []
        for item in self.plans[R][index][chosen].tolist():
            shape, place = divmod(item, len(self.symmetries))
            shapes.append(load_shape(shape_path(self.data_dir, R, self.names[R][shape]), self.symmetries[place]))
        return pack_shapes(shapes, R)


class Structures(Dataset):
    """Occupancy grids for the structure VAE: `structures[step]` is (B, 1, G, G, G) uint8. All blocks stay in memory."""

    def __init__(
        self,
        data_dir: str,
        names: list[str],
        resolution: int,
        batch_size: int,
        seed: int,
        symmetries: tuple[int, ...] = (0,),
    ):
        self.edge, self.symmetries = resolution // BLOCK, symmetries
        self.coords = [read_arrays(shape_path(data_dir, resolution, name), "block_coords")[0] for name in names]
        self.plan = plan_shapes(len(names) * len(symmetries), batch_size, seed)

    def __getitem__(self, step: int) -> Tensor:
        return self.load(step, EVERY)

    def sizes(self, step: int) -> np.ndarray:
        return self.plan.sizes(step)

    def load(self, step: int, chosen: np.ndarray | slice) -> Tensor:
        shape, place = np.divmod(self.plan[step][chosen], len(self.symmetries))
        return self.occupancy(shape, np.array(self.symmetries)[place])

    def occupancy(self, shapes: np.ndarray, symmetries: np.ndarray) -> Tensor:
        """Fill the dense grids of shapes (B,), moved by symmetries (B,): (B, 1, G, G, G) uint8."""
        grids = np.zeros((len(shapes), 1, self.edge, self.edge, self.edge), dtype=np.uint8)
        for grid, shape, symmetry in zip(grids[:, 0], shapes, symmetries, strict=True):
            grid[tuple(transform_voxels(self.coords[shape], self.edge, int(symmetry)).T)] = 1
        return torch.from_numpy(grids)


class StructureViews(Dataset):
    """Pictures for the structure DiT, whose latents are on the device already: `dataset[step]` is a `ViewBatch`."""

    def __init__(self, views: Views, batch_size: int, views_per_shape: int, seed: int):
        self.views, self.views_per_shape, self.seed = views, views_per_shape, seed
        num_shapes = shapes_per_batch(batch_size, views_per_shape)
        self.plan = plan_shapes(2 * len(views.names), num_shapes, seed)

    def __getitem__(self, step: int) -> ViewBatch:
        return self.load(step, EVERY)

    def sizes(self, step: int) -> np.ndarray:
        return self.plan.sizes(step).repeat(self.views_per_shape)

    def load(self, step: int, chosen: np.ndarray | slice) -> ViewBatch:
        shapes, mirrored = np.divmod(self.plan[step].repeat(self.views_per_shape), 2)
        symmetries, images = self.views.draw(shapes, mirrored, draw(self.seed, step, 2), chosen)
        return ViewBatch(torch.from_numpy(shapes[chosen]), torch.from_numpy(symmetries), images)


class LatentViews(Dataset):
    """Latents and pictures for the latent DiT: `dataset[step]` is a `LatentBatch`.

    `tokens` (n,) are those of the shapes `views.names`. `cache` keeps all latents in memory, shared by forked workers.

    Raises:
        FileNotFoundError: latents of a shape are missing in a symmetry that its views need.
    """

    def __init__(
        self,
        data_dir: str,
        resolution: int,
        views: Views,
        tokens: np.ndarray,
        batch_size: int,
        views_per_shape: int,
        max_tokens: int,
        seed: int,
        cache: bool = True,
    ):
        self.views, self.views_per_shape, self.seed = views, views_per_shape, seed
        num_shapes = shapes_per_batch(batch_size, views_per_shape)
        self.plan = BatchPlan(tokens.repeat(2), num_shapes, max_tokens // views_per_shape, seed)
        self.paths = {
            (shape, symmetry): latent_path(data_dir, resolution, views.names[shape], symmetry)
            for shape in np.unique(self.plan.kept // 2).tolist()
            for symmetry in views.symmetries_of(shape)
        }
        if missing := [path for path in self.paths.values() if not path.is_file()]:
            raise FileNotFoundError(
                f"expected latents in {missing[0]} and {len(missing) - 1} other files; "
                "make them with python -m training.encode_latents"
            )
        self.cache = {}
        if cache:
            with ThreadPoolExecutor() as pool:
                self.cache = dict(zip(self.paths, pool.map(self._read, self.paths.values()), strict=True))

    @staticmethod
    def _read(path: Path) -> list[np.ndarray]:
        return read_arrays(path, "coords", "mean", "logvar")

    def __getitem__(self, step: int) -> LatentBatch:
        return self.load(step, EVERY)

    def sizes(self, step: int) -> np.ndarray:
        return self.plan.sizes(step).repeat(self.views_per_shape)

    def load(self, step: int, chosen: np.ndarray | slice) -> LatentBatch:
        shapes, mirrored = np.divmod(self.plan[step].repeat(self.views_per_shape), 2)
        symmetries, images = self.views.draw(shapes, mirrored, draw(self.seed, step, 2), chosen)
        keys = zip(shapes[chosen].tolist(), symmetries.tolist(), strict=True)
        latents = [self.cache.get(key) or self._read(self.paths[key]) for key in keys]
        coords, mean, logvar = zip(*latents, strict=True)
        return LatentBatch(_with_batch(coords), _cat(mean), _cat(logvar), images)


def plan_shapes(num_items: int, batch_size: int, seed: int) -> BatchPlan:
    """Plan batches of items of equal size."""
    return BatchPlan(np.ones(num_items, dtype=np.int64), batch_size, batch_size, seed)


def shapes_per_batch(batch_size: int, views_per_shape: int) -> int:
    """The number of different shapes in a batch.

    Raises:
        ValueError: `views_per_shape` does not divide the batch size.
    """
    if batch_size % views_per_shape:
        raise ValueError(f"expected a batch_size divisible by views_per_shape {views_per_shape}, got {batch_size}")
    return batch_size // views_per_shape


def _cat(arrays) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _with_batch(coords) -> Tensor:
    """Join the coordinates (m, 3) of all samples into (M, 4) int32 [batch, x, y, z]."""
    sample = np.arange(len(coords)).repeat([len(c) for c in coords])
    return torch.from_numpy(np.column_stack([sample, np.concatenate(coords)]).astype(np.int32))


# --- loading


def load_batches(dataset: Dataset, first_step: int, last_step: int, workers: int, device: torch.device) -> Iterator:
    """Yield the batches of steps [first_step, last_step) on the device; each is copied while the previous step runs."""
    loader = DataLoader(
        dataset,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        # forked workers share the parent's caches without copying them
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_start_worker,
    )
    for batch in loader:
        yield to_device(batch, device)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles these, and stops its workers
        signal.signal(number, signal.SIG_IGN)


def to_device(batch, device: torch.device):
    """Move a batch or a tensor to the device without waiting for the copy."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Voxels):
        return batch.map(lambda tensor: to_device(tensor, device))
    return type(batch)(*(to_device(b, device) if isinstance(b, Tensor | Voxels | tuple) else b for b in batch))
