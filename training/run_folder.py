"""The folder of a run and its lock.

A run folder holds config.json, metrics.jsonl, TensorBoard events and the two newest checkpoints `step_<n>.pt`. One
process writes to it. Exports to a model folder, which several stages share, wait for each other.

A lock is the file `training.lock`, with the host and the process that hold it. It works on every file system. The lock
of a dead process is taken over: on the same host at once, on another one when it was not touched for minutes.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from d3ds2.storage.atomic_file import replacing
from d3ds2.storage.model_folder import ALL_NETWORKS
from training.distributed import FolderInUseError

LOCK = "training.lock"
TOUCH_SECONDS, DEAD_SECONDS = 20.0, 300.0  # a live process touches its lock; one that was not touched so long is dead
UNFINISHED_SECONDS = 10.0  # after which a lock without an owner is that of a process killed while it wrote the name
LEFTOVERS = (
    *(".tmp*", ".config.*", ".metrics.*", ".step_*", "step_*.tmp", f".{LOCK}.*"),
    *(f".{name}.*" for name in ALL_NETWORKS),
)


def checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints in a run folder, newest first."""
    return sorted(Path(out_dir).glob("step_*.pt"), reverse=True)


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run folder, or None."""
    return next(iter(checkpoints(out_dir)), None)


def last_step(out_dir: str | Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    newest = newest_checkpoint(out_dir)
    return 0 if newest is None else int(newest.stem.removeprefix("step_"))


def check_run(out_dir: str | Path, model_dir: str | Path) -> None:
    """Check that a run folder belongs to a model folder: a run continues only with the model it began with.

    Raises:
        ValueError: the run folder has a checkpoint of another model folder, or its config.json is damaged.
    """
    if newest_checkpoint(out_dir) is None:
        return
    owner = read_settings(out_dir)["model_dir"]
    if Path(owner).resolve() != Path(model_dir).resolve():
        raise ValueError(f"{out_dir} is a run of the model {owner}, not of {model_dir}: choose another run.out_dir")


def read_settings(out_dir: str | Path) -> dict:
    """Read a run's config.json.

    Raises:
        ValueError: it is damaged.
        OSError: it is missing or cannot be read.
    """
    file = Path(out_dir) / "config.json"
    try:
        settings = json.loads(file.read_text())
        settings["model_dir"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"damaged file {file} ({error})") from None
    return settings


def write_settings(out_dir: str | Path, settings: dict) -> None:
    """Write a run's config.json. A run that goes on with other settings says in one line which have changed."""
    if newest_checkpoint(out_dir) is not None and (changes := changed(read_settings(out_dir), settings)):
        tqdm.write(f"{out_dir} goes on from step {last_step(out_dir)} with other settings: {', '.join(changes)}")
    with replacing(Path(out_dir) / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2))


def changed(before: dict, after: dict) -> list[str]:
    """List the settings that differ, as "run.seed 0 -> 1"; those that only one of the two has are left out."""
    old, new = dict(_dotted(before)), dict(_dotted(json.loads(json.dumps(after))))
    return [f"{key} {old[key]} -> {new[key]}" for key in new if key in old and old[key] != new[key]]


def _dotted(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- locks


@contextmanager
def exporting(model_dir: str | Path) -> Generator[None]:
    """Hold the lock of a model folder, after waiting for it, and delete what killed exports have left behind."""
    Path(model_dir).mkdir(parents=True, exist_ok=True)
    with locked(model_dir, wait=True):
        clear_leftovers(model_dir)
        yield


@contextmanager
def locked(folder: str | Path, wait: bool = False) -> Generator[None]:
    """Hold the lock of a folder.

    Raises:
        FolderInUseError: another process holds it, unless `wait`.
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(folder) / LOCK
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


def clear_leftovers(folder: str | Path) -> None:
    """Delete the unfinished files of killed processes. Hold the folder's lock meanwhile."""
    for pattern in LEFTOVERS:
        for path in Path(folder).glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _remove(path: Path, text: str) -> None:
    """Delete a lock if it has this text; another process may have taken it over meanwhile."""
    aside = path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
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
