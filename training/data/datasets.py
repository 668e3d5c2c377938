"""Batches of training data. A batch follows from (seed, step), so a resumed run sees the same batches.

A dataset is indexed by the step and returns the whole, packed batch of that step; `loading.py` runs it in worker
processes and moves the batches to the device. `sizes` and `load` serve `training.data.parts`: the tokens of each sample
of a step, (B,), and the batch of some of its samples. The files are those of `training.data.shape_files`.

Shapes are also turned and mirrored (see `symmetry`); the picture of a mirrored shape is flipped.

Sizes: M blocks = tokens of a batch, B samples, G = R/8 blocks per edge, S pixels per edge.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d3ds2.geometry.voxels import BLOCK
from training.data.array_files import DamagedFileError
from training.data.batch_plans import (
    BatchPlan,
    ResolutionPlan,
    draw,
    plan_shapes,
    plan_views,
    say_left_out,
)
from training.data.crops import draw_crop
from training.data.damaged_files import DamagedFiles, read_or_replace
from training.data.held import hold
from training.data.packs import load_entries, open_data
from training.data.shape_batches import ShapeBatch, pack_shapes
from training.data.shape_files import (
    StoredShape,
    list_shapes_at,
    load_shape,
    read_structure,
    shape_path,
)
from training.data.steps import Steps, ViewSteps
from training.data.symmetry import transform_voxels
from training.data.views import Drawn, Views

MEMORY_GIB = 4.0  # that a dataset may hold by default; a process holds it once, and shares it with its workers
BYTES_OF_BLOCK = 6  # three int16


class ViewBatch(NamedTuple):
    """Pictures of B shapes, and the shapes they show."""

    shapes: Tensor  # (B,) int64
    symmetries: Tensor  # (B,) int64
    images: Tensor  # (B, 4, S, S) uint8: the object on white, and its mask
    grids: Tensor | None = None  # (B, 1, G, G, G) uint8 occupancy, where the latents are not on the device


class Choice(NamedTuple):
    """Pictures that are on the device, or are rendered there, and the B shapes they show."""

    shapes: Tensor  # (B,) int64
    symmetries: Tensor  # (B,) int64
    pictures: Tensor  # (B,) int64, rows of `DevicePictures.images`
    mirrored: Tensor  # (B,) bool
    grids: Tensor | None = None  # (B, 1, G, G, G) uint8 occupancy, where the latents are not on the device


# --- datasets


class Shapes(Steps):
    """SDFs for the VAE: `shapes[step]` is a `ShapeBatch` of one of the resolutions.

    `crop` is the edge of the cube of each shape that is decoded and its margin, both in latents; None: decode all.
    """

    def __init__(
        self,
        data_dir: str,
        split: str,
        resolutions: tuple[int, ...],
        batch_size: int,
        max_tokens: int,
        seed: int,
        symmetries: tuple[int, ...] = (0,),
        crop: tuple[int, int] | None = None,
    ):
        self.folder, self.symmetries, self.seed, self.crop = open_data(data_dir), symmetries, seed, crop
        self.resolution_of_step = ResolutionPlan(resolutions, seed)
        self.names, self.plans, self.damaged = {}, {}, {}
        for R, (names, tokens) in list_shapes_at(self.folder, split, resolutions).items():
            self.names[R] = names
            load_entries(shape_path(self.folder, R, "").parent)
            say_left_out(tokens, max_tokens, f"shapes at {R}³")
            self.damaged[R] = DamagedFiles(len(tokens), "prepare_shapes")
            self.plans[R] = BatchPlan(tokens, batch_size, max_tokens, seed, copies=len(symmetries))

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        R, index = self.resolution_of_step[step]
        return self.plans[R].sizes(index)

    def has_damage(self) -> bool:
        """Whether files are known to be damaged, so that other shapes stand for theirs."""
        return any(damaged.count() for damaged in self.damaged.values())

    def load(self, step: int, chosen: np.ndarray | slice) -> ShapeBatch:
        """The batch of the chosen samples (b,) of a step."""
        R, index = self.resolution_of_step[step]
        items, plan, read = self.plans[R][index][chosen].tolist(), self.plans[R], partial(self._read, R)
        while True:
            drawn = [read_or_replace(itertools.chain([item], plan.others(item, index)), read) for item in items]
            try:
                batch = pack_shapes([shape for _, shape in drawn], R)
            except ValueError:
                if not self._find_damaged(R, dict(drawn)):
                    raise
                continue
            if self.crop is None:
                return batch
            samples = np.arange(len(self.plans[R][index]))[chosen].tolist()
            draws = [draw(self.seed, step, 5, sample) for sample in samples]
            return batch._replace(crop=draw_crop(batch.block_coords, batch.latent_voxels, *self.crop, draws))

    def _read(self, resolution: int, item: int) -> tuple[int, StoredShape]:
        shape, place = divmod(item, len(self.symmetries))
        path, symmetry = self._path(resolution, shape), self.symmetries[place]
        return item, self.damaged[resolution].read(shape, lambda: load_shape(path, symmetry))

    def _path(self, resolution: int, shape: int) -> Path:
        return shape_path(self.folder, resolution, self.names[resolution][shape])

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
                message = f"damaged file {self._path(resolution, shape)} ({error})"
                self.damaged[resolution].add(shape, DamagedFileError(message))
                found = True
        return found


class Structures(Steps):
    """Occupancy grids for the structure VAE: `structures[step]` is (B, 1, G, G, G) uint8.

    Args:
        names: the shapes; their files are read when they are drawn.
        tokens: (n,) of the shapes, by which it is known whether all blocks fit into memory; None: keep none there.
        memory_gib: keep all blocks in memory if they need no more than this.
    """

    def __init__(
        self,
        data_dir: str,
        names: list[str],
        resolution: int,
        batch_size: int,
        seed: int,
        symmetries: tuple[int, ...] = (0,),
        tokens: np.ndarray | None = None,
        memory_gib: float = MEMORY_GIB,
    ):
        self.folder, self.names, self.resolution, self.symmetries = open_data(data_dir), names, resolution, symmetries
        load_entries(shape_path(self.folder, resolution, "").parent)
        self.edge, self.damaged = resolution // BLOCK, DamagedFiles(len(names), "prepare_shapes")
        self.plan = plan_shapes(len(names) * len(symmetries), batch_size, seed)
        self.held: dict[int, np.ndarray] = {}
        if tokens is not None:
            num_bytes = int(tokens.sum()) * BYTES_OF_BLOCK
            self.held = hold(range(len(names)), len(names), num_bytes, memory_gib, self._blocks)

    def _blocks(self, shape: int) -> np.ndarray:
        return read_structure(shape_path(self.folder, self.resolution, self.names[shape]))

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        return self.plan.sizes(step)

    def has_damage(self) -> bool:
        """Whether files are known to be damaged, so that other shapes stand for theirs."""
        return self.damaged.count() > 0

    def load(self, step: int, chosen: np.ndarray | slice) -> Tensor:
        """The batch of the chosen samples (b,) of a step."""
        grids = []
        for item in self.plan[step][chosen].tolist():
            grids.append(read_or_replace(itertools.chain([item], self.plan.others(item, step)), self._grid_of_item))
        return torch.from_numpy(np.stack(grids)[:, None])

    def _grid_of_item(self, item: int) -> np.ndarray:
        shape, place = divmod(item, len(self.symmetries))
        return self.grid(shape, self.symmetries[place])

    def occupancy(self, shapes: np.ndarray, symmetries: np.ndarray) -> Tensor:
        """Return the grids of shapes (B,), moved by symmetries (B,): (B, 1, G, G, G) uint8. Raises as `grid`."""
        grids = [self.grid(*pair) for pair in zip(shapes.tolist(), symmetries.tolist(), strict=True)]
        return torch.from_numpy(np.stack(grids)[:, None])

    def grid(self, shape: int, symmetry: int) -> np.ndarray:
        """Fill the dense grid of a shape, moved by a symmetry: (G, G, G) uint8.

        Raises:
            DamagedFileError, FileNotFoundError: the shape's file cannot be read.
            TooManyDamagedError: too many files are damaged.
        """
        blocks = self.held.get(shape)
        if blocks is None:
            blocks = self.damaged.read(shape, lambda: self._blocks(shape))
        grid = np.zeros((self.edge, self.edge, self.edge), dtype=np.uint8)
        grid[tuple(transform_voxels(blocks, self.edge, symmetry).T)] = 1
        return grid


class StructureSteps(ViewSteps):
    """Views of shapes for the structure DiT, and the structures that they show.

    Args:
        structures: those of `views.names`; None: the batches have no shapes with them, and no file is checked.
        with_grids: send the occupancy grids with the batches; else only replace shapes that are known to be damaged.
        weights: how often each shape of `views.names` is drawn, in proportion, (n,); None: all equally often.
    """

    def __init__(
        self,
        views: Views,
        batch_size: int,
        views_per_shape: int,
        seed: int,
        structures: Structures | None = None,
        with_grids: bool = False,
        weights: np.ndarray | None = None,
    ):
        plan = plan_views(len(views.names), batch_size, views_per_shape, seed, weights)
        super().__init__(views, plan, views_per_shape, seed)
        self.structures, self.with_grids = structures, with_grids

    def grid(self, shape: int, symmetry: int) -> np.ndarray | None:
        """The occupancy grid (G, G, G) of a shape in a symmetry if it is sent. Raises as `Structures.grid`."""
        if self.structures is None:
            return None
        if self.with_grids:
            return self.structures.grid(shape, symmetry)
        return self.structures.damaged.read(shape, lambda: None)

    def stack(self, grids: tuple) -> Tensor | None:
        """The `grid` of each sample as one tensor (b, 1, G, G, G) if they are sent."""
        return torch.from_numpy(np.stack(grids)[:, None]) if self.with_grids else None


class StructureViews(StructureSteps):
    """Pictures for the structure DiT: `dataset[step]` is a `ViewBatch`."""

    def load(self, step: int, chosen: np.ndarray | slice) -> ViewBatch:
        """The batch of the chosen samples (b,) of a step."""
        shapes, symmetries, pictures, grids = zip(*self.each(step, chosen, self._read), strict=True)
        return ViewBatch(torch.tensor(shapes), torch.tensor(symmetries), torch.stack(pictures), self.stack(grids))

    def _read(self, drawn: Drawn) -> tuple[int, int, Tensor, np.ndarray | None]:
        symmetry, picture = self.views.picture(drawn)
        return drawn.shape, symmetry, picture, self.grid(drawn.shape, symmetry)
