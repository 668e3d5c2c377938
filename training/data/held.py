"""Data kept in memory: all that a dataset reads where it fits a budget, else nothing."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from training.data.damaged_files import READ_ERRORS

GIB = 1 << 30
OVERHEAD = 300  # bytes of Python's objects around the arrays of a file


def hold(keys: Iterable[Any], number: int, num_bytes: float, gib: float, read: Callable[[Any], Any]) -> dict[Any, Any]:
    """Return `read(key)` of each key, by key; {} if that is more than the budget.

    A file that cannot be read is left out: its error comes again when it is drawn.

    Args:
        number: of the keys.
        num_bytes: of the arrays of all files.
        gib: the budget in GiB.
    """
    if num_bytes + number * OVERHEAD > gib * GIB:
        return {}

    def read_or_none(key: Any) -> Any:
        try:
            return read(key)
        except READ_ERRORS:
            return None

    keys = list(keys)
    with ThreadPoolExecutor() as pool:
        return {key: value for key, value in zip(keys, pool.map(read_or_none, keys), strict=True) if value is not None}
