"""Damaged files of a dataset: each is named once and skipped, as long as they are few."""

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from d3ds2.storage.one_line import one_line
from training.data.array_files import DamagedFileError

READ_ERRORS = (DamagedFileError, FileNotFoundError)  # those of a single file; the machine's own errors end the run
MOST = 100  # damaged files
SHARE = 0.01  # of all files, if that is fewer


class TooManyDamagedError(ValueError):
    """More files are damaged than may be skipped."""


class DamagedFiles:
    """Which files are damaged or missing, known to all processes that load data.

    There are `number` things, such as shapes, with `files_of_each` files; file i is of thing i // files_of_each.
    `script` makes the files again.
    """

    def __init__(self, number: int, script: str, files_of_each: int = 1):
        self.script = script
        self.limit = max(1, min(MOST, int(SHARE * number)))
        self.flags = torch.zeros((number, files_of_each), dtype=torch.bool).share_memory_()

    def has(self, file: int) -> bool:
        """Whether a file is known to be damaged."""
        return bool(self.flags.view(-1)[file])

    def count(self) -> int:
        """Count the things that have a damaged file."""
        return int(self.flags.any(1).sum())

    def add(self, file: int, error: Exception) -> None:
        """Remember a damaged file, and print its error the first time.

        Raises:
            TooManyDamagedError: more things have damaged files than may be skipped.
        """
        if self.has(file):
            return
        is_first = not self.flags[file // self.flags.shape[1]].any()
        self.flags.view(-1)[file] = True
        line, count = one_line(error), self.count()
        again = f"python -m training.{self.script} with verify=true makes it again"
        if count > self.limit:
            number = f"{count} of {len(self.flags)} are damaged or missing, and at most {self.limit} are skipped"
            raise TooManyDamagedError(f"{line}; {number}; {again}")
        if is_first:
            # over the progress bar, but not by tqdm.write: its lock would stay taken where a loading process is ended
            print(f"\rskipped: {line}; {again}", file=sys.stderr, flush=True)

    def read(self, file: int, read: Callable[[], Any]) -> Any:
        """Return `read()`, which reads a file. It is not called where the file is known to be damaged.

        Raises:
            DamagedFileError, FileNotFoundError: the file cannot be read.
            TooManyDamagedError: more things have damaged files than may be skipped.
        """
        if self.has(file):
            raise DamagedFileError("named before")
        try:
            return read()
        except READ_ERRORS as error:
            self.add(file, error)
            raise


def first_readable(candidates: Iterable[Any], read: Callable[[Any], Any]) -> Any:
    """Return `read` of the first candidate whose files can be read. It depends on which files are damaged alone.

    Raises:
        DamagedFileError: there is none.
    """
    for candidate in candidates:
        with contextlib.suppress(*READ_ERRORS):
            return read(candidate)
    raise DamagedFileError("expected a file that can be read, got damaged ones")


def read_or_replace(candidates: Iterable[Any], read: Callable[[Any], Any]) -> Any:
    """Return `read` of the first candidate whose files can be read.

    Raises:
        TooManyDamagedError: there is none.
    """
    try:
        return first_readable(candidates, read)
    except READ_ERRORS as error:
        raise TooManyDamagedError(one_line(error)) from None
