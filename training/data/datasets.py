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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.kernels.devices import copies_in_background
from training.data.batch_plans import BatchPlan, ResolutionPlan, draw, plan_shapes, say_left_out, shapes_per_batch
from training.data.damaged_files import READ_ERRORS, DamagedFiles, TooManyDamagedError
from training.data.shape_batches import ShapeBatch, join, join_coords, pack_shapes
from training.data.shape_files import (
    DamagedFileError,
    StoredShape,
    latent_path,
    list_shapes,
    load_shape,
    read_arrays,
    read_latents,
    shape_path,
)
from training.data.steps import Steps, ViewSteps
from training.data.symmetry import transform_voxels
from training.data.views import Views


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


# --- datasets


class Shapes(Steps):
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
        self.names, self.plans, self.damaged = {}, {}, {}
        for R in resolutions:
            self.names[R], tokens = list_shapes(data_dir, split, R)
            say_left_out(tokens, max_tokens, f"shapes at {R}³")
            self.damaged[R] = DamagedFiles(len(tokens), "prepare_shapes", len(symmetries))
            self.plans[R] = BatchPlan(tokens.repeat(len(symmetries)), batch_size, max_tokens, seed)

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        R, index = self.resolution_of_step[step]
        return self.plans[R].sizes(index)

    def load(self, step: int, chosen: np.ndarray | slice) -> ShapeBatch:
        """The batch of the chosen samples (b,) of a step."""
        R, index = self.resolution_of_step[step]
        items, plan = self.plans[R][index][chosen].tolist(), self.plans[R]
        while True:
            read = [self.damaged[R].read(item, plan.others(item, index), partial(self._read, R)) for item in items]
            try:
                return pack_shapes([shape for _, shape in read], R)
            except ValueError:
                if not self._find_damaged(R, dict(read)):
                    raise

    def _read(self, resolution: int, item: int) -> tuple[int, StoredShape]:
        shape, place = divmod(item, len(self.symmetries))
        path = shape_path(self.data_dir, resolution, self.names[resolution][shape])
        return item, load_shape(path, self.symmetries[place])

    def _find_damaged(self, resolution: int, shapes: dict[int, StoredShape]) -> bool:
        """Note which of these items make no batch, and whether there are any.

        Files of older versions have no checksums, and may be damaged.
        """
        found = False
        for item, stored in shapes.items():
            try:
                pack_shapes([stored], resolution)
            except ValueError as error:
                shape = item // len(self.symmetries)
                path = shape_path(self.data_dir, resolution, self.names[resolution][shape])
                self.damaged[resolution].add(shape, DamagedFileError(f"damaged file {path} ({error})"))
                found = True
        return found


class Structures(Steps):
    """Occupancy grids for the structure VAE: `structures[step]` is (B, 1, G, G, G) uint8. All blocks stay in memory.

    The attribute `names` lists the shapes whose files can be read; the others are left out.

    Raises:
        TooManyDamagedError: too many files are damaged.
    """

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
        self.names, self.coords, damaged = [], [], DamagedFiles(len(names), "prepare_shapes")
        for place, name in enumerate(names):
            try:
                self.coords += read_arrays(shape_path(data_dir, resolution, name), "block_coords")
                self.names.append(name)
            except READ_ERRORS as error:
                damaged.add(place, error)
        self.plan = plan_shapes(len(self.names) * len(symmetries), batch_size, seed)

    def keep(self, names: list[str]) -> None:
        """Leave out all shapes but these, which then have this order."""
        coords = dict(zip(self.names, self.coords, strict=True))
        self.names, self.coords = names, [coords[name] for name in names]

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        return self.plan.sizes(step)

    def load(self, step: int, chosen: np.ndarray | slice) -> Tensor:
        """The batch of the chosen samples (b,) of a step."""
        shape, place = np.divmod(self.plan[step][chosen], len(self.symmetries))
        return self.occupancy(shape, np.array(self.symmetries)[place])

    def occupancy(self, shapes: np.ndarray, symmetries: np.ndarray) -> Tensor:
        """Fill the dense grids of shapes (B,), moved by symmetries (B,): (B, 1, G, G, G) uint8."""
        grids = np.zeros((len(shapes), 1, self.edge, self.edge, self.edge), dtype=np.uint8)
        for grid, shape, symmetry in zip(grids[:, 0], shapes, symmetries, strict=True):
            grid[tuple(transform_voxels(self.coords[shape], self.edge, int(symmetry)).T)] = 1
        return torch.from_numpy(grids)


class StructureViews(ViewSteps):
    """Pictures for the structure DiT, whose latents are on the device already: `dataset[step]` is a `ViewBatch`.

    `weights` (n,) say how often each shape of `views.names` is drawn, in proportion; None: all equally often.
    """

    def __init__(
        self, views: Views, batch_size: int, views_per_shape: int, seed: int, weights: np.ndarray | None = None
    ):
        self.views, self.views_per_shape, self.seed = views, views_per_shape, seed
        num_shapes = shapes_per_batch(batch_size, views_per_shape)
        weights = None if weights is None else weights.repeat(2)
        self.plan = plan_shapes(2 * len(views.names), num_shapes, seed, weights)

    def load(self, step: int, chosen: np.ndarray | slice) -> ViewBatch:
        """The batch of the chosen samples (b,) of a step."""
        shapes, mirrored = np.divmod(self.plan[step].repeat(self.views_per_shape), 2)
        symmetries, images = self.views.draw(shapes, mirrored, draw(self.seed, step, 2), chosen)
        return ViewBatch(torch.from_numpy(shapes[chosen]), torch.from_numpy(symmetries), images)


class LatentViews(ViewSteps):
    """Latents and pictures for the latent DiT: `dataset[step]` is a `LatentBatch`.

    `tokens` (n,) are those of the shapes `views.names`. `cache` keeps all latents in memory, shared by forked workers.

    Raises:
        FileNotFoundError: latents of many shapes are missing in a symmetry that their views need.
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
        say_left_out(tokens, max_tokens // views_per_shape, f"shapes at {resolution}³")
        self.plan = BatchPlan(tokens.repeat(2), num_shapes, max_tokens // views_per_shape, seed)
        self.paths = {
            (shape, symmetry): latent_path(data_dir, resolution, views.names[shape], symmetry)
            for shape in np.unique(self.plan.kept // 2).tolist()
            for symmetry in views.symmetries_of(shape)
        }
        self.damaged = DamagedFiles(len(tokens), "encode_latents", items_per_file=2)
        missing = {key: path for key, path in self.paths.items() if not path.is_file()}
        if len({shape for shape, _ in missing}) > self.damaged.limit:
            first, *others = missing.values()
            raise FileNotFoundError(
                f"expected latents in {first} and {len(others)} other files; "
                "make them with python -m training.encode_latents"
            )
        for (shape, _), path in missing.items():
            self.damaged.add(shape, FileNotFoundError(f"missing file {path}"))
        self.cache = {}
        if cache:
            with ThreadPoolExecutor() as pool:
                self.cache = dict(zip(self.paths, pool.map(self._read, self.paths.values()), strict=True))

    @staticmethod
    def _read(path: Path) -> list[np.ndarray] | None:
        try:
            return read_latents(path)
        except READ_ERRORS:
            return None  # the error comes again when the latents are drawn

    def load(self, step: int, chosen: np.ndarray | slice) -> LatentBatch:
        """The batch of the chosen samples (b,) of a step."""
        shapes, mirrored = np.divmod(self.plan[step].repeat(self.views_per_shape), 2)
        symmetries, images = self.views.draw(shapes, mirrored, draw(self.seed, step, 2), chosen)
        latents = []
        for row, (shape, mirror) in enumerate(zip(shapes[chosen].tolist(), mirrored[chosen].tolist(), strict=True)):
            item, key = 2 * shape + mirror, (shape, int(symmetries[row]))
            read = partial(self._latents_of, step, item, key, images[row])
            latents.append(self.damaged.read(item, self.plan.others(item, step), read))
        coords, mean, logvar = zip(*latents, strict=True)
        return LatentBatch(join_coords(coords), join(mean), join(logvar), images)

    def _latents_of(self, step: int, drawn: int, key: tuple[int, int], image: Tensor, item: int) -> list[np.ndarray]:
        """Return the latents of an item. One that is not the drawn one puts its picture into `image` (4, S, S)."""
        picture = None
        if item != drawn:
            shape, mirror = divmod(item, 2)
            rng = draw(self.seed, step, 4, drawn)
            (symmetry,), (picture,) = self.views.draw(np.array([shape]), np.array([mirror]), rng)
            key = shape, int(symmetry)
        latents = self.cache.get(key) or read_latents(self.paths[key])
        if picture is not None:
            image.copy_(picture)
        return latents


# --- loading


def load_batches(dataset: Dataset, first_step: int, last_step: int, workers: int, device: torch.device) -> Iterator:
    """Yield the batches of steps [first_step, last_step) on the device; each is copied while the previous step runs."""
    loader = DataLoader(
        dataset,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=copies_in_background(device),
        prefetch_factor=4 if workers else None,
        # forked workers share the parent's caches without copying them
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_start_worker,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            yield to_device(batch, device)
    except TooManyDamagedError as error:  # one line, without the traceback of the worker process
        raise TooManyDamagedError(str(error).strip().rpartition(f"{TooManyDamagedError.__name__}: ")[2]) from None
    finally:
        if workers:  # else an error keeps them alive, and they ignore the signal that ends them at exit
            batches._shutdown_workers()


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles these, and stops its workers
        signal.signal(number, signal.SIG_IGN)


def to_device(batch, device: torch.device):
    """Move a batch or a tensor to the device, if possible without waiting for the copy."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=copies_in_background(device))
    if isinstance(batch, Voxels):
        return batch.map(lambda tensor: to_device(tensor, device))
    return type(batch)(*(to_device(b, device) if isinstance(b, Tensor | Voxels | tuple) else b for b in batch))
