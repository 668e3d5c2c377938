"""Run one function on many meshes, each in a worker process. A mesh that kills its process fails alone.

Each worker has its own pipe and works on one mesh at a time, so it is known which mesh a dead worker had. That mesh is
tried once more when all others are done, with the machine to itself, because the memory that it lacked may have been
another's. Workers end with this process, also where it is killed. Imports no torch.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from training.data.meshes import MeshEntry

ENGINES = ("processes", "ray")
START_TRIES = 3  # workers that may die one after another before they are ready
OUT_OF_MEMORY = 77  # exit code of a worker
MACHINE_ERRORS = {  # errors of the disk, its permissions or its network: no other mesh would do better
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENOTCONN", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}


class Failure(NamedTuple):
    """The reason why a mesh has no result."""

    error: str  # one line
    of_machine: bool = False  # the disk or the machine is at fault, not the mesh


class MachineError(OSError):
    """An error of the disk or the machine, which ends a run. What is finished is kept."""


class AllFailedError(ValueError):
    """No mesh has a result."""


def failure_of(error: Exception) -> Failure:
    """Describe an error in one line, and say whose it is."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return Failure(text, isinstance(error, OSError) and error.errno in MACHINE_ERRORS)


def check_engine(engine: str) -> None:
    """Raise ValueError for an unknown engine."""
    if engine not in ENGINES:
        raise ValueError(f"expected engine of {', '.join(ENGINES)}, got {engine!r}")


def run_engine(
    function: Callable[[MeshEntry, Any], Any], entries: list[MeshEntry], config: Any
) -> Generator[tuple[MeshEntry, Any]]:
    """Yield as `run_jobs`, by the engine and with the number of workers that the config says."""
    if config.engine == "ray":
        from training.ray_jobs import run_on_ray  # it imports this module

        return run_on_ray(function, entries, config)
    return run_jobs(function, entries, config, config.workers or os.cpu_count() or 1)


def run_jobs(
    function: Callable[[MeshEntry, Any], Any], entries: list[MeshEntry], config: Any, workers: int
) -> Generator[tuple[MeshEntry, Any]]:
    """Yield each mesh with `function(entry, config)`, or with a `Failure`, in the order in which they finish.

    `function` must be importable, since workers are started afresh ("spawn"). Closing the iterator ends the workers.

    Raises:
        OSError: no worker can be started.
    """
    pending, again, crew, deaths = list(reversed(entries)), [], [], 0
    second_try = False
    try:
        while pending or again or crew:
            if not pending and not crew:
                pending, again, second_try = again, [], True
            while len(crew) < min(1 if second_try else workers, len(pending) + len(crew)) and pending:
                crew.append(_Worker(function, config, pending.pop()))
            ready = wait([worker.connection for worker in crew])
            for worker in [worker for worker in crew if worker.connection in ready]:
                try:
                    result = worker.connection.recv()
                except (EOFError, OSError):
                    crew.remove(worker)
                    death = worker.end()
                    deaths = 0 if worker.is_ready else deaths + 1
                    if deaths == START_TRIES:
                        raise OSError(f"{deaths} worker processes died at their start: {death}") from None
                    if second_try:
                        yield worker.entry, Failure(death)
                    else:
                        again.append(worker.entry)
                    continue
                if not worker.is_ready:  # its first word
                    worker.is_ready = True
                    continue
                entry = worker.entry
                if pending and not second_try:
                    worker.give(pending.pop())
                else:  # each second try has its own process
                    crew.remove(worker)
                    worker.end()
                yield entry, result
    finally:
        for worker in crew:
            worker.process.kill()


def finished(
    jobs: Generator[tuple[MeshEntry, Any]], total: int, log: Path, failed: list[dict]
) -> Iterator[tuple[MeshEntry, Any]]:
    """Yield the meshes of `run_jobs` that have a result; add the others to `failed`, and write them to `log`.

    Raises:
        MachineError: the disk or the machine is at fault.
    """
    with contextlib.closing(jobs), open(log, "w") as file, tqdm(total=total, unit="mesh") as progress:
        for entry, result in jobs:
            progress.update()
            if not isinstance(result, Failure):
                yield entry, result
                continue
            if result.of_machine:
                raise MachineError(f"{result.error}; what is finished is kept, and the same command continues")
            failed.append({"name": entry.name, "path": str(entry.path), "error": result.error})
            file.write(json.dumps(failed[-1]) + "\n")
            file.flush()
            progress.set_postfix(failures=len(failed))


class _Worker:
    """A process that works on one mesh at a time."""

    def __init__(self, function: Callable, config: Any, entry: MeshEntry):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function, config), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self.is_ready = False
        self.give(entry)

    def give(self, entry: MeshEntry) -> None:
        self.entry = entry
        with contextlib.suppress(OSError):  # dead already: the next `recv` says so
            self.connection.send(entry)

    def end(self) -> str:
        """Wait for the end of the process; return its cause."""
        self.connection.close()
        self.process.join()
        code = self.process.exitcode or 0
        if code == OUT_OF_MEMORY:
            return "out of memory"
        return f"its process died with {f'signal {-code}' if code < 0 else f'exit code {code}'} (out of memory?)"


def _work(connection: Connection, function: Callable, config: Any) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends its workers
    connection.send("ready")
    while True:
        try:
            entry = connection.recv()
        except EOFError:
            return
        try:
            result = function(entry, config)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # what is left of the memory is in pieces; another process has all of it
        except Exception as error:  # one bad mesh in thousands must not end the run; it is reported
            result = failure_of(error)
        connection.send(result)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however that happened."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
