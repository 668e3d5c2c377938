"""Datasets with a batch for each step, of which a rank may load a part.

A batch is a function of (seed, step) and of which files are damaged. It does not depend on what a process has read
before, nor on the number of processes or parts: a damaged file is replaced sample by sample, by random numbers of that
sample.
"""

import abc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from training.data.batch_plans import BatchPlan, draw
from training.data.damaged_files import read_or_replace
from training.data.views import Drawn, Views

EVERY = slice(None)  # all samples of a step


class Steps(Dataset, abc.ABC):
    """`dataset[step]` is the whole batch of a step."""

    def __getitem__(self, step: int) -> Any:
        return self.load(step, EVERY)

    @abc.abstractmethod
    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""

    @abc.abstractmethod
    def load(self, step: int, chosen: np.ndarray | slice) -> Any:
        """The batch of the chosen samples (b,) of a step."""


class ViewSteps(Steps):
    """Batches in which each shape of a plan has several views, one after the other.

    An item of the plan is a shape of `views`, mirrored or not: `2 * shape + mirrored`. `augment`: whether the numbers
    by which a picture is changed are drawn with its view.
    """

    augment = True

    def __init__(self, views: Views, plan: BatchPlan, views_per_shape: int, seed: int):
        self.views, self.plan, self.views_per_shape, self.seed = views, plan, views_per_shape, seed

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        return self.plan.sizes(step).repeat(self.views_per_shape)

    def each(self, step: int, chosen: np.ndarray | slice, read: Callable[[Drawn], Any]) -> list[Any]:
        """Return `read` of the view drawn for each of the chosen samples (b,) of a step.

        Where `read` finds a damaged file, the sample gets another shape of at most as many tokens.

        Raises:
            TooManyDamagedError: nothing can be read.
        """
        rng, items = draw(self.seed, step, 2), self.plan[step].repeat(self.views_per_shape).tolist()
        drawn = [self._draw(item, rng) for item in items]
        rows = np.arange(len(items))[chosen].tolist()
        return [read_or_replace(itertools.chain([drawn[r]], self._others(step, items[r])), read) for r in rows]

    def _draw(self, item: int, rng: np.random.Generator) -> Drawn:
        return self.views.draw_view(*divmod(item, 2), rng, self.augment)

    def _others(self, step: int, item: int) -> Iterator[Drawn]:
        return (self._draw(other, draw(self.seed, step, 4, item)) for other in self.plan.others(item, step))
