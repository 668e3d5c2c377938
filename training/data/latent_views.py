"""Latents and pictures for the latent DiT.

Sizes: B samples, M tokens of a batch, C latent channels, S pixels per edge; n shapes.
"""

import contextlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data.batch_plans import BatchPlan, say_left_out, shapes_per_batch
from training.data.damaged_files import READ_ERRORS, DamagedFiles
from training.data.datasets import MEMORY_GIB, Choice
from training.data.held import hold
from training.data.packs import open_data
from training.data.shape_batches import join, join_coords
from training.data.shape_files import latent_path, read_latents
from training.data.steps import ViewSteps
from training.data.symmetry import NUM_SYMMETRIES
from training.data.views import Drawn, Views

CHECKED_FILES = 4096  # of a large corpus, whether they are there


class LatentBatch(NamedTuple):
    """Latents of B shapes, each with a picture; tokens in the order of `Voxels`."""

    coords: Tensor  # (M, 4) int32 [batch, x, y, z] at R/8
    mean: Tensor  # (M, C) fp16
    logvar: Tensor  # (M, C) fp16
    images: Tensor  # (B, 4, S, S) uint8

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.images)


class ChosenLatents(NamedTuple):
    """A `LatentBatch` whose pictures are on the device, or are rendered there."""

    coords: Tensor
    mean: Tensor
    logvar: Tensor
    choice: Choice

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.choice.shapes)


class LatentSteps(ViewSteps):
    """Latents of shapes for the latent DiT, and views of them.

    Args:
        tokens: (n,) of the shapes `views.names`.
        cache: keep all latents in memory, shared by forked workers, if they need no more than `memory_gib`.

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
        memory_gib: float = MEMORY_GIB,
    ):
        most = max_tokens // views_per_shape
        say_left_out(tokens, most, f"shapes at {resolution}³")
        plan = BatchPlan(tokens, shapes_per_batch(batch_size, views_per_shape), most, seed, copies=2)
        super().__init__(views, plan, views_per_shape, seed)
        self.folder, self.resolution = open_data(data_dir), resolution
        self.damaged = DamagedFiles(len(tokens), "encode_latents", NUM_SYMMETRIES)
        wanted = views.turns.symmetries() & (tokens <= most)[:, None]  # (n, 8)
        self._check(wanted)
        self.held: dict[int, list[np.ndarray]] = {}
        if cache:
            files = np.flatnonzero(wanted)
            self.held = hold(files.tolist(), len(files), self._num_bytes(wanted, tokens), memory_gib, self._latents)

    def has_damage(self) -> bool:
        """Whether files are known to be damaged, so that other shapes stand for theirs."""
        return super().has_damage() or self.damaged.count() > 0

    def _check(self, wanted: np.ndarray) -> None:
        """Look whether files are there: all of a small corpus, some of a large one."""
        files = np.flatnonzero(wanted)
        files = files[:: -(-len(files) // CHECKED_FILES)].tolist()
        with ThreadPoolExecutor() as pool:
            paths = [self._path(file) for file in files]
            are_there = pool.map(_is_file, paths)
            missing = {f: path for f, path, is_there in zip(files, paths, are_there, strict=True) if not is_there}
        if len({file // NUM_SYMMETRIES for file in missing}) > self.damaged.limit:
            first, *others = missing.values()
            raise FileNotFoundError(
                f"expected latents in {first} and {len(others)} other files; "
                "make them with python -m training.encode_latents"
            )

    def _num_bytes(self, wanted: np.ndarray, tokens: np.ndarray) -> float:
        """Estimate the bytes of the wanted latents from one file."""
        for file in np.flatnonzero(wanted)[:CHECKED_FILES].tolist():
            with contextlib.suppress(*READ_ERRORS):
                latents = self._latents(file)
                return int(wanted.sum(1) @ tokens) * sum(a.nbytes for a in latents) / max(1, len(latents[0]))
        return math.inf

    def _path(self, file: int) -> Path:
        shape, symmetry = divmod(file, NUM_SYMMETRIES)
        return latent_path(self.folder, self.resolution, self.views.names[shape], symmetry)

    def _latents(self, file: int) -> list[np.ndarray]:
        return read_latents(self._path(file))

    def latents(self, shape: int, symmetry: int) -> list[np.ndarray]:
        """The arrays of `read_latents` of a shape in a symmetry. Raises as that, or TooManyDamagedError."""
        file = NUM_SYMMETRIES * shape + symmetry
        return self.held.get(file) or self.damaged.read(file, lambda: self._latents(file))


class LatentViews(LatentSteps):
    """Latents and pictures for the latent DiT: `dataset[step]` is a `LatentBatch`."""

    def load(self, step: int, chosen: np.ndarray | slice) -> LatentBatch:
        """The batch of the chosen samples (b,) of a step."""
        latents, pictures = zip(*self.each(step, chosen, self._read), strict=True)
        return LatentBatch(*joined(latents), torch.stack(pictures))

    def _read(self, drawn: Drawn) -> tuple[list[np.ndarray], Tensor]:
        symmetry, picture = self.views.picture(drawn)
        return self.latents(drawn.shape, symmetry), picture


def joined(latents: Sequence[list[np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    """Join the latents of B shapes, as `read_latents` returns each: coords (M, 4), mean and logvar (M, C)."""
    coords, mean, logvar = zip(*latents, strict=True)
    return join_coords(coords), join(mean), join(logvar)


def _is_file(path: Path) -> bool:
    return path.is_file()
