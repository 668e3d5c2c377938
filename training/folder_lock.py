"""The lock of a folder: one process at a time writes there. Imports no torch.

A lock is a file with the host and the process that hold it. It works on every file system. The lock of a dead process
is taken over: on the same host at once, on another one when it was not touched for minutes.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

LOCK = "training.lock"
TOUCH_SECONDS, DEAD_SECONDS = 20.0, 300.0  # a live process touches its lock; one that was not touched so long is dead
UNFINISHED_SECONDS = 10.0  # after which a lock without an owner is that of a process killed while it wrote the name


class FolderInUseError(RuntimeError):
    """Another process writes to a folder."""


@contextmanager
def locked(folder: str | Path, wait: bool = False, name: str = LOCK) -> Generator[None]:
    """Hold the lock of a folder. A process must not ask for a lock that it holds.

    Raises:
        FolderInUseError: another process holds it, unless `wait`.
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(folder) / name
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}
    text = json.dumps(owner | {"key": uuid.uuid4().hex})
    while not _create(path, text):
        seen = _read(path)
        if seen is None:
            continue  # it has just been released
        if _is_dead(path, seen):
            _remove(path, seen)
        elif wait:
            time.sleep(0.2)
        else:
            raise FolderInUseError(f"{folder} is in use by {_name(seen)}; wait for it, or delete {path} if it is gone")
    ended = threading.Event()
    touching = threading.Thread(target=_touch, args=(path, ended), daemon=True)
    touching.start()
    try:
        yield
    finally:
        ended.set()
        touching.join()
        _remove(path, text)


def _create(path: Path, text: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno and not error.filename:  # a full disk names no file; else the folder cannot be written to
            error.filename = str(path)
            path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _remove(path: Path, text: str) -> None:
    """Delete a lock if it has this text; another process may have taken it over meanwhile."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) in (text, None):
        aside.unlink(missing_ok=True)
    else:
        aside.replace(path)


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_SECONDS):
        try:
            os.utime(path)
        except OSError:
            return


def _is_dead(path: Path, text: str) -> bool:
    """Whether the process that wrote a lock has ended."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    owner = _owner(text)
    if owner is None:
        return age > UNFINISHED_SECONDS
    if owner["host"] != socket.gethostname() or os.name == "nt":  # a process there cannot be asked
        return age > DEAD_SECONDS
    if owner["pid"] == os.getpid():  # from an earlier life of a container; a process locks a folder once
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return owner["started"] != _start_of(owner["pid"])  # the number may be that of a later process


def _owner(text: str) -> dict | None:
    try:
        owner = json.loads(text)
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "started": owner["started"]}
    except (ValueError, KeyError, TypeError):
        return None


def _name(text: str) -> str:
    owner = _owner(text)
    return "a process that starts" if owner is None else f"process {owner['pid']} on {owner['host']}"


def _start_of(pid: int) -> str | None:
    """The time at which a process started, where the system says so; None elsewhere and for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return None
