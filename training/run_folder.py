"""The folder of a run.

A run folder holds config.json, metrics.jsonl, TensorBoard events and the two newest checkpoints `step_<n>`. One
run writes to it. Exports to a model folder, which several stages share, wait for each other.
"""

import json
import re
import shutil
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from d3ds2.storage.atomic_file import replacing
from d3ds2.storage.model_folder import ALL_NETWORKS
from training.folder_lock import LOCK, locked

LEFTOVERS = (
    *(".tmp*", ".config.*", ".metrics.*", ".step_*", "step_*.tmp", f".{LOCK}.*"),
    *(f".{name}.*" for name in ALL_NETWORKS),
)


def checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints in a run folder, newest first: folders, and files of earlier versions."""
    found = [path for path in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d+(\.pt)?", path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.stem.removeprefix("step_"))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. A process that is killed meanwhile leaves a part under another name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.{uuid.uuid4().hex[:8]}")
    checkpoint.rename(aside)
    _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run folder, or None."""
    return next(iter(checkpoints(out_dir)), None)


def last_step(out_dir: str | Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    newest = newest_checkpoint(out_dir)
    return 0 if newest is None else step_of(newest)


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


# --- exports and leftovers


@contextmanager
def exporting(model_dir: str | Path) -> Generator[None]:
    """Hold the lock of a model folder, after waiting for it, and delete what killed exports have left behind."""
    Path(model_dir).mkdir(parents=True, exist_ok=True)
    with locked(model_dir, wait=True):
        clear_leftovers(model_dir)
        yield


def clear_leftovers(folder: str | Path) -> None:
    """Delete the unfinished files and checkpoints of killed processes. Hold the folder's lock meanwhile."""
    for pattern in LEFTOVERS:
        for path in Path(folder).glob(pattern):
            if path.is_file() or path.name.startswith(".step_"):
                _delete(path)
