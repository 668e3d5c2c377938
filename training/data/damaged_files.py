"""Damaged files of a dataset: each is named once and skipped, as long as they are few."""

import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from d3ds2.storage.one_line import one_line
from training.data.shape_files import DamagedFileError

READ_ERRORS = (DamagedFileError, FileNotFoundError)  # those of a single file; the machine's own errors end the run
MOST = 100  # damaged files
SHARE = 0.01  # of all files, if that is fewer


class TooManyDamagedError(ValueError):
    """More files are damaged than may be skipped."""


class DamagedFiles:
    """Which of `number` files are damaged or missing, known to all processes that load data.

    `script` makes the files again. File i has the items `items_per_file * i` and those that follow.
    """

    def __init__(self, number: int, script: str, items_per_file: int = 1):
        self.script, self.items_per_file = script, items_per_file
        self.limit = max(1, min(MOST, int(SHARE * number)))
        self.flags = torch.zeros(number, dtype=torch.bool).share_memory_()

    def has(self, file: int) -> bool:
        """Whether a file is known to be damaged."""
        return bool(self.flags[file])

    def add(self, file: int, error: Exception) -> None:
        """Remember a damaged file, and print its error the first time.

        Raises:
            TooManyDamagedError: there are more damaged files than may be skipped.
        """
        if self.has(file):
            return
        self.flags[file] = True
        line, count = one_line(error), int(self.flags.sum())
        again = f"python -m training.{self.script} with verify=true makes it again"
        if count > self.limit:
            number = f"{count} of {len(self.flags)} are damaged or missing, and at most {self.limit} are skipped"
            raise TooManyDamagedError(f"{line}; {number}; {again}")
        # over the progress bar, but not by tqdm.write: its lock would stay taken where a loading process is ended
        print(f"\rskipped: {line}; {again}", file=sys.stderr, flush=True)

    def read(self, item: int, others: Iterable[int], read: Callable[[int], Any]) -> Any:
        """Return `read(item)`, or where its file is damaged `read` of the first of the others whose file is not.

        Raises:
            TooManyDamagedError: there are more damaged files than may be skipped, or no other one can be read.
        """
        for candidate in itertools.chain([item], others):
            file = candidate // self.items_per_file
            if not self.has(file):
                try:
                    return read(candidate)
                except READ_ERRORS as error:
                    self.add(file, error)
        raise TooManyDamagedError(f"expected a file that can be read, got {int(self.flags.sum())} damaged ones")
