"""Compile loops over voxels with numba, and spread them over the cores.

Kernels release the GIL and run on plain threads, each on its own range of blocks. No numba threading layer is
involved, so they are safe after a fork, inside worker processes and when called from several threads at once.

A kernel calls only kernels of its own file, because numba keeps the machine code on disk until that one file changes.
"""

import os
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numba
from numba.core.event import Listener, install_listener


def kernel(function: Callable) -> Callable:
    """Compile `function` at its first call, and keep the machine code on disk: once per machine.

    It is kept beside the source, or, where that cannot be written, in the user's cache folder.

    The kept code names the module that it was compiled in, and ComfyUI loads this package under a name that contains
    its path. So each such name gets its own files, which numba names after the function's qualified name.
    """
    function.__qualname__ += f"_{zlib.crc32(function.__module__.encode()):08x}"
    try:
        compiled = numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return numba.njit(function, nogil=True)
    save = compiled._cache.save_overload

    def save_if_possible(signature: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk: the machine code is in memory all the same
            save(signature, data)

    compiled._cache.save_overload = save_if_possible
    return compiled


@contextmanager
def announce_numba(notify: Callable[[], object]) -> Generator[None]:
    """Call notify() once in the block, when a loop begins to be compiled because its machine code is not on disk."""
    with install_listener("numba:compile", _Announcer(notify)):
        yield


class _Announcer(Listener):
    def __init__(self, notify: Callable[[], object]):
        self.notify_once: Callable[[], object] | None = notify

    def on_start(self, event: Any) -> None:
        notify, self.notify_once = self.notify_once, None
        if notify is not None:
            notify()

    def on_end(self, event: Any) -> None: ...


def for_ranges(function: Callable[..., None], count: int, threads: int | None, *args: Any) -> None:
    """Call function(start, stop, *args) for ranges that cover [0, count), on several threads.

    Args:
        threads: None for one on each core.

    Raises:
        ValueError: threads is below 1.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"expected at least 1 thread, got {threads}")
    size = max(32, -(-count // (16 * threads)))  # 16 ranges per thread balance dense and sparse blocks
    ranges = [(start, min(start + size, count)) for start in range(0, count, size)]
    if threads == 1 or len(ranges) < 2:
        for start, stop in ranges:
            function(start, stop, *args)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(function, start, stop, *args) for start, stop in ranges]:
            done.result()
