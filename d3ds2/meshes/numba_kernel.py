"""Compile loops over voxels with numba, and spread them over the cores.

Kernels release the GIL and run on plain threads, each on its own range of blocks. No numba threading layer is
involved, so they are safe after a fork, inside worker processes and when called from several threads at once.

The machine code outlives the installation. It lies in the user's cache folder, or in NUMBA_CACHE_DIR, and it is found
by the content of the source: a fresh clone of the same version compiles nothing, wherever it is and whatever name
ComfyUI loads it under. numba itself tells versions of numba, of Python and of the processor apart. Two rules follow for
a file with kernels: a kernel calls only kernels of its own file, and constants stand above the first kernel.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.event import Listener, install_listener
from numba.misc.appdirs import AppDirs

UNUSED_DAYS = 90  # after its last import, a version's machine code is deleted when another version is kept


def kernel(function: FunctionType) -> Callable:
    """Compile `function` at its first call, and keep the machine code on disk: once per machine.

    Where no folder can be written, or there is no source file, the machine code is in memory alone.
    """
    try:
        stand_in = _in_stand_in(function)
    except OSError:
        return numba.njit(function, nogil=True)
    compiled = numba.njit(stand_in, nogil=True)
    compiled.__module__ = function.__module__
    stand_in.__globals__[function.__name__] = compiled  # for kernels above this one that call it
    with suppress(RuntimeError):  # no folder can be written
        compiled._cache = _Cache(stand_in)
    return compiled


def _in_stand_in(function: FunctionType) -> FunctionType:
    """Return `function` as if it were defined in a module that is named after the content of the real one.

    Kept machine code contains the name of its module, which numba imports when it loads the code. In ComfyUI, the real
    name contains the path of the installation.

    Raises:
        OSError: there is no source file.
    """
    name = f"d3ds2_{Path(function.__code__.co_filename).stem}_{_identity(function)}"
    names = vars(sys.modules.setdefault(name, ModuleType(name)))
    names |= {key: value for key, value in function.__globals__.items() if not key.startswith("__")}
    stand_in = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    stand_in.__module__, stand_in.__qualname__, stand_in.__doc__ = name, function.__qualname__, function.__doc__
    return stand_in


def _identity(function: FunctionType) -> str:
    """Return a hash of all that decides the machine code of the kernels in the file of `function`.

    These are the content of that file, the numbers that it imports, which numba writes into the machine code, and the
    content of this file, which sets numba's options.

    Raises:
        OSError: there is no source file.
    """
    digest = hashlib.sha256()
    for source in (function.__code__.co_filename, __file__):
        digest.update(Path(source).read_bytes())
    for name, value in sorted(function.__globals__.items()):
        if isinstance(value, np.ndarray):
            digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, (int, float, tuple, np.generic)):
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()[:16]


class _Locator:
    """The folder in which numba keeps the machine code of one file; its methods are those that numba calls."""

    def __init__(self, folder: Path, function: FunctionType):
        self.folder = folder
        self.line = function.__code__.co_firstlineno
        self._py_file = function.__code__.co_filename  # numba names it in warnings

    @classmethod
    def from_function(cls, function: FunctionType, source: str) -> "_Locator | None":
        """Return the first folder that can be written: NUMBA_CACHE_DIR, the user's, or the one beside the source."""
        user = AppDirs(appname="numba", appauthor=False).user_cache_dir
        for cache in (config.CACHE_DIR, user, Path(source).parent / "__pycache__"):
            if cache:
                locator = cls(Path(cache) / "d3ds2" / function.__module__.removeprefix("d3ds2_"), function)
                with suppress(OSError):
                    locator.ensure_cache_path()
                    return locator
        return None

    def ensure_cache_path(self) -> None:
        """Make the folder, mark it as used, and delete those of versions that were not used for UNUSED_DAYS.

        Raises:
            OSError: the folder cannot be written.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            _delete_unused(self.folder.parent)
        tempfile.TemporaryFile(dir=self.folder).close()  # permissions do not say it on every system
        os.utime(self.folder)

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return self.folder.name

    def get_disambiguator(self) -> str:
        return str(self.line)


def _delete_unused(cache: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in cache.iterdir():
        with suppress(OSError):  # another process deletes it
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder)


class _CacheFiles(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012 -- numba's name


class _Files(IndexDataCacheFile):
    """The files of one function: each signature and processor has its own.

    numba numbers them. Two processes that compile at once for different processors, as on a cluster with one home for
    all, would take the same number, and the index of one could point to the machine code of the other.
    """

    def save(self, key: Any, data: Any) -> None:
        name = self._data_name_pattern.format(number=zlib.crc32(repr(key).encode()))
        overloads = self._load_index()
        if overloads.get(key) != name:
            self._save_index(overloads | {key: name})
        self._save_data(name, data)


class _Cache(FunctionCache):
    _impl_class = _CacheFiles

    def __init__(self, function: FunctionType):
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk: the machine code is in memory all the same
            super().save_overload(sig, data)


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
