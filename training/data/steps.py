"""Datasets with a batch for each step, of which a rank may load a part."""

import abc
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from training.data.batch_plans import BatchPlan

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
    """Batches in which each shape of a plan has several views, one after the other."""

    plan: BatchPlan
    views_per_shape: int

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        return self.plan.sizes(step).repeat(self.views_per_shape)
