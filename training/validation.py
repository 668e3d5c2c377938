"""The loss on shapes that a run does not train on, and pictures of what the network makes of them.

Every `run.validate_every` steps, the averaged weights (EMA) are tried on the first batches of `run.validate_split`. All
random numbers, such as the noise and the times of a flow, come from (seed, number of the batch), so the losses of two
steps can be compared. The ranks share the batches, and their losses are added in the order of the batches: the result
is the same on any number of ranks. The random numbers of training stay what they were, and so does its result.

A split that has no shapes, or whose files are missing, is named in one line, and the run goes on without validation.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from d3ds2.images.contact_sheet import contact_sheet
from d3ds2.kernels.devices import copies_in_background, make_generator
from d3ds2.storage.one_line import one_line
from training.data.loading import to_device
from training.distributed import Ranks
from training.run import Log, RunConfig, autocast, seed_step

SALT = 0x7A11DA7E  # so that validation and training draw different numbers

Loss = Callable[[Any, Any, torch.Generator], dict[str, Tensor]]  # network, batch, generator -> scalars
Draw = Callable[[Any, Any, int], list]  # network, batch, number of shapes -> a row of pictures of each shape


class Validation:
    """Validates the average of the network that is trained when the step has come.

    Args:
        averaged: returns that network with whole weights, as `State.averaged`.
        load: returns the batches of `run.validate_split`, and how many of them show every shape once. It is called
            before the first validation, not before.
        loss: computes "loss" and others of a batch on the device. The generator is seeded for the batch.
        draw: makes pictures of the first shapes of a batch; the first rank alone calls it.
        labels: headings of the pictures of a row.
    """

    def __init__(
        self,
        run: RunConfig,
        ranks: Ranks,
        averaged: Callable[[], nn.Module],
        load: Callable[[], tuple[Dataset, int]],
        loss: Loss,
        draw: Draw,
        labels: Sequence[str],
    ):
        self.run, self.ranks, self.averaged = run, ranks, averaged
        self.load, self.loss, self.draw, self.labels = load, loss, draw, labels
        self.generator = make_generator(ranks.device)
        self.data: tuple[Dataset, int] | None = None
        self.fault = ""

    def __call__(self, step: int, log: Log) -> None:
        """Validate after a step, if it is time, and add the losses to its record; all ranks call it."""
        if not self.run.validate_every or step % self.run.validate_every or self.fault:
            return
        since, device = time.perf_counter(), self.ranks.device
        network = self.averaged()
        was_training = network.training
        network.eval()
        with torch.random.fork_rng([device] if copies_in_background(device) else []), torch.no_grad():
            losses = self._losses(network)
            if losses and self.ranks.is_first and self.run.validate_pictures:
                self._show(network, step, log)
        network.train(was_training)
        log.note(losses, time.perf_counter() - since)

    def _losses(self, network: nn.Module) -> dict[str, float]:
        """Return the mean of each loss over the batches, by names such as "val_loss"; nothing after an error."""
        try:
            self.data = self.data or self.load()
            number = min(self.data[1], self.run.validate_batches)
            own: Any = [(n, self._loss_of(network, n)) for n in range(self.ranks.rank, number, self.ranks.size)]
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            own = one_line(error) or type(error).__name__
        every = self.ranks.all(own)
        faults = [found for found in every if isinstance(found, str)]
        if faults:
            self.fault = faults[0]
            if self.ranks.is_first:
                tqdm.write(f"no validation on split {self.run.validate_split!r}: {self.fault}")
            return {}
        in_order = [losses for _, losses in sorted((item for found in every for item in found), key=lambda i: i[0])]
        return {f"val_{name}": float(np.mean([losses[name] for losses in in_order])) for name in in_order[0]}

    def _batch(self, number: int) -> Any:
        assert self.data is not None  # `_losses` reads it
        return to_device(self.data[0][number], self.ranks.device)

    def _loss_of(self, network: nn.Module, number: int) -> dict[str, float]:
        batch = self._batch(number)
        seed_step(self.generator, self.run.seed ^ SALT, number)
        with autocast(self.run, self.ranks.device):
            losses = self.loss(network, batch, self.generator)
        return {name: float(value) for name, value in losses.items()}

    def _show(self, network: nn.Module, step: int, log: Log) -> None:
        """Draw the first shapes of the first batch."""
        try:
            with autocast(self.run, self.ranks.device):
                rows = self.draw(network, self._batch(0), self.run.validate_pictures)
            log.picture("validation", np.asarray(contact_sheet(rows, self.labels, cell=192)), step)
        except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
            tqdm.write(f"no pictures of the validation at step {step}: {one_line(error)}")


def batches_of(number: int, batch_size: int) -> int:
    """The number of batches that show each of `number` shapes once, about."""
    return max(1, -(-number // batch_size))
