"""The checkpoints of a run: folders `step_<n>`, written in the background, whole or not at all.

A checkpoint maps names to tensors: "model.<weight>", "ema.<weight>" and "optimizer.<weight>.<moment>". They lie in
files of safetensors. torch.distributed.checkpoint lets each rank write its share, and reads them for any number of
ranks, whether these hold whole weights or shards. Its own format would need pickle, and neither has checksums: so
checkpoint.json, which is written last, holds the step and the checksum of each file.

A folder is written under another name. It is renamed when all of it is on the disk, so the newest name is that of the
newest whole checkpoint.

Earlier versions wrote files `step_<n>.pt`, which are still read.
"""

import contextlib
import json
import os
import shutil
import uuid
import warnings
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from training.distributed import LostRankError, Ranks, own_part
from training.run_folder import checkpoints, remove

KEEP_CHECKPOINTS = 2
PARTS = ("model", "ema", "optimizer")  # each rank writes one file for each
SUMMARY = "checkpoint.json"
READ_AT_ONCE = 1 << 24  # bytes
READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, UnpicklingError)
READ_ERRORS += (zipfile.BadZipFile, SafetensorError)


def _dcp():
    """Import torch.distributed.checkpoint, which takes a second, when it is first needed."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process needs none
    from torch.distributed import checkpoint

    return checkpoint


# --- write


def save_in_background(out_dir: Path, step: int, tensors: dict[str, Tensor], ranks: Ranks) -> Future:
    """Copy tensors, then begin to write them as `step_<n>`; all ranks call it, after the one before has ended.

    The older of more than two checkpoints are deleted afterwards.

    Returns:
        The result is None once the checkpoint has its name, else an OSError that names it, or a LostRankError.
    """
    dcp = _dcp()
    path = out_dir / f"step_{step:08d}"
    unfinished = Path(ranks.from_first(str(out_dir / f".{path.name}.{uuid.uuid4().hex[:8]}")))
    files = {name: 1 + PARTS.index(name.partition(".")[0]) for name in tensors}
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), files, save_distributed=True)
    saved = dcp.async_save(tensors, storage_writer=writer, process_group=ranks.background, no_dist=not ranks.is_joined)
    thread = ThreadPoolExecutor(1, "checkpoint")
    finished = thread.submit(_finish, saved, unfinished, path, step, ranks)
    thread.shutdown(wait=False)
    return finished


def _finish(saved: Future, unfinished: Path, path: Path, step: int, ranks: Ranks) -> None:
    """Wait until all ranks have written, then give the checkpoint its name."""
    try:
        saved.result()
        if ranks.is_first:
            _publish(unfinished, path, step)
    except BaseException as error:  # a CheckpointException is not an Exception
        shutil.rmtree(unfinished, ignore_errors=True)
        raise _cause_of(error, path) from error


def _cause_of(error: BaseException, path: Path) -> Exception:
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
    if isinstance(causes[0], RuntimeError):  # of a connection: files raise OSErrors
        return LostRankError("another rank has ended")
    return OSError(f"cannot write {path}: {causes[0]}")


def _publish(unfinished: Path, path: Path, step: int) -> None:
    checksums = {file.name: checksum(file) for file in sorted(unfinished.glob("*.safetensors"))}
    with open(unfinished / SUMMARY, "w") as file:
        json.dump({"step": step, "checksums": checksums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush(unfinished)
    if path.exists():  # damaged, or of the same step
        remove(path)
    unfinished.rename(path)
    _flush(path.parent)
    for old in checkpoints(path.parent)[KEEP_CHECKPOINTS:]:
        remove(old)


def _flush(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(file: Path) -> str:
    """The CRC-32 of a file, as eight hexadecimal digits."""
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(READ_AT_ONCE):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


# --- read


class Stored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: its step.
        shapes: the shape of each whole tensor.
        tensors: the tensors of a file of an earlier version, on the CPU; None for a folder, which `read_into` reads.
    """

    step: int
    shapes: dict[str, torch.Size]
    tensors: dict[str, Tensor] | None


def open_checkpoint(path: Path, trained: list[str]) -> Stored:
    """Return what a checkpoint holds.

    Args:
        trained: the names of the weights that the optimiser moves, in its order; earlier versions numbered them.
    """
    if path.suffix == ".pt":
        values = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        tensors = {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in values[part].items()}
        for number, moments in values["optimizer"]["state"].items():
            if number >= len(trained):
                raise ValueError(f"expected {len(trained)} weights in training, got number {number}")
            tensors |= {f"optimizer.{trained[number]}.{moment}": tensor for moment, tensor in moments.items()}
        return Stored(values["step"], {name: tensor.shape for name, tensor in tensors.items()}, tensors)
    metadata = _dcp().HuggingFaceStorageReader(str(path)).read_metadata()
    step = json.loads((path / SUMMARY).read_text())["step"]
    return Stored(step, {name: stored.size for name, stored in metadata.state_dict_metadata.items()}, None)


def read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors of these names in place, each whole or this rank's shard of it."""
    dcp = _dcp()
    dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def find_intact(out_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that is whole and finite, and name those that are not; None if there is none at all.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged = []
    for path in checkpoints(out_dir):
        if fault := fault_of(path):
            damaged.append(f"{path} ({fault})")
            continue
        if damaged:
            tqdm.write(f"damaged checkpoint {', '.join(damaged)}: the run goes on from {path.name}")
        return path
    if damaged:
        raise ValueError(f"damaged checkpoint {', '.join(damaged)}; delete it to start from step 0")
    return None


def fault_of(path: Path) -> str:
    """Say what is wrong with a checkpoint; "" if nothing is."""
    try:
        return _fault_of_file(path) if path.suffix == ".pt" else _fault_of_folder(path)
    except READ_ERRORS as error:
        return str(error).partition("\n")[0] or type(error).__name__


def _fault_of_folder(path: Path) -> str:
    summary = json.loads((path / SUMMARY).read_text())
    int(summary["step"])
    if not summary["checksums"]:
        return "no files"
    for name, expected in summary["checksums"].items():
        if checksum(path / name) != expected:
            return f"wrong checksum of {name}"
        with safe_open(path / name, framework="pt") as file:
            if not all(is_finite(file.get_tensor(tensor)) for tensor in file.keys()):  # noqa: SIM118, no dict
                return "values that are not finite"
    return ""


def _fault_of_file(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            return "wrong checksum"
    values = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if missing := {"step", *PARTS} - values.keys():
        return f"no {', '.join(sorted(missing))}"
    return "" if is_finite(values) else "values that are not finite"


def is_finite(values) -> bool:
    """Whether all floating tensors in nested dicts and lists are finite; of a sharded one, this shard. Waits once."""
    finite = [tensor.isfinite().all() for tensor in map(own_part, _tensors_in(values)) if tensor.is_floating_point()]
    return all(torch.stack(on_device).all().item() for on_device in _by_device(finite))


def _tensors_in(values):
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors_in(value)


def _by_device(flags: list[Tensor]) -> list[list[Tensor]]:
    devices = {flag.device for flag in flags}  # AdamW keeps its steps on the CPU unless it is fused
    return [[flag for flag in flags if flag.device == device] for device in devices]
