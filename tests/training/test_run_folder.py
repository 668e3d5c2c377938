"""Run folders: their lock, leftovers of killed runs, damaged files, and settings that have changed."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from training.folder_lock import LOCK, FolderInUseError, locked
from training.run import RunConfig, read_metrics, start
from training.run_folder import changed, check_run, exporting
from training.state import State

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from training.folder_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a script, as far as a run folder cares."""

    model_dir: str
    run: RunConfig
    batch_size: int = 4


def make_config(tmp_path: Path, **changes) -> Config:
    run = RunConfig(**({"out_dir": str(tmp_path / "run"), "device": "cpu", "tensorboard": False} | changes))
    return Config(str(tmp_path / "model"), run)


def make_state(tmp_path: Path, width: int = 2) -> State:
    torch.manual_seed(0)
    return State(nn.Linear(3, width), make_config(tmp_path).run)


def trained(tmp_path: Path, *steps: int) -> State:
    """A run with checkpoints at these steps."""
    Path(tmp_path, "run").mkdir(exist_ok=True)
    state = make_state(tmp_path)
    while state.step < max(steps):
        state.model(torch.ones(1, 3)).sum().backward()
        state.update()
        if state.step in steps:
            state.save()
    state.wait()
    return state


def holder(folder: Path) -> subprocess.Popen:
    """Another process, which holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


# --- locks


def test_second_writer_is_refused_and_a_killed_one_is_followed(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "run").mkdir()
    process = holder(tmp_path / "run")
    refused = f"run is in use by process {process.pid} on .*; wait for it, or delete .*{LOCK} if it is gone"
    with pytest.raises(FolderInUseError, match=refused), start(config.run, config):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    with start(config.run, config):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_export_waits_for_another_one(tmp_path):
    process = holder(tmp_path)
    since = time.monotonic()
    kill = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    process_is_gone = []
    with exporting(tmp_path):
        process_is_gone.append(process.poll() is not None or process.wait(1) == -signal.SIGKILL)
    assert process_is_gone == [True] and time.monotonic() - since >= 0.4
    kill.wait()
    process.communicate()


@pytest.mark.parametrize(
    ("owner", "age", "dead"),
    [
        pytest.param({"host": "elsewhere", "pid": 1}, 10, False, id="another-host"),
        pytest.param({"host": "elsewhere", "pid": 1}, 600, True, id="another-host-silent-for-minutes"),
        pytest.param({"host": socket.gethostname(), "pid": os.getppid(), "started": "1"}, 10, True, id="same-number"),
        pytest.param({"host": socket.gethostname(), "pid": os.getpid()}, 10, True, id="own-number"),
        pytest.param(None, 1, False, id="being-written"),
        pytest.param(None, 60, True, id="killed-while-writing"),
    ],
)
def test_locks_of_the_dead_are_taken_over(tmp_path, owner, age, dead):
    lock = tmp_path / LOCK
    lock.write_text("" if owner is None else json.dumps({"started": None} | owner))
    os.utime(lock, (time.time() - age,) * 2)
    if dead:
        with locked(tmp_path):
            pass
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(FolderInUseError), locked(tmp_path):
            pass
        assert lock.exists()


def test_leftovers_are_cleared_at_the_next_start(tmp_path):
    config = make_config(tmp_path)
    leftovers = ["run/step_00000003.tmp", "run/.step_00000003.abc.pt", "run/.config.x.json", "run/.metrics.x.jsonl"]
    leftovers += ["run/.step_00000003.abc/shard-00001.safetensors", "run/.step_00000001.abc/checkpoint.json"]
    leftovers += ["model/.sdf_vae.x.safetensors", "model/.tmpAbC", "model/.config.x.json"]
    kept = ["model/sdf_vae.safetensors", "model/notes.txt", "run/events.out.tfevents"]
    for name in leftovers + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    with start(config.run, config):
        pass
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*kept, "run/config.json"} and not list((tmp_path / "run").glob(".step*"))


# --- settings


def test_changed_settings_are_said_in_a_line(tmp_path, capsys):
    config = make_config(tmp_path)
    with start(config.run, config):
        trained(tmp_path, 3)
    with start(config.run, config):
        pass
    assert "other settings" not in capsys.readouterr().out
    other = dataclasses.replace(
        config, batch_size=8, run=dataclasses.replace(config.run, seed=1, learning_rate=0.5, betas=(0.9, 0.95))
    )
    with start(other.run, other):
        pass
    line = "run goes on from step 3 with other settings: "
    line += (
        "run.seed 0 -> 1, run.learning_rate 0.0001 -> 0.5, run.betas [0.9, 0.99] -> [0.9, 0.95], batch_size 4 -> 8\n"
    )
    assert capsys.readouterr().out.endswith(line)
    assert changed({"a": {"b": 1}, "gone": 1}, {"a": {"b": 1}, "new": 2}) == []


def test_damaged_settings_are_named(tmp_path):
    trained(tmp_path, 1)
    (tmp_path / "run" / "config.json").write_text('{"model_dir": ')
    with pytest.raises(ValueError, match=r"damaged file .*config\.json"):
        check_run(tmp_path / "run", tmp_path / "model")


# --- checkpoints


def as_file(state: State) -> Path:
    """Write a checkpoint as earlier versions did."""
    path = Path(state.config.out_dir) / f"step_{state.step:08d}.pt"
    parts = {"model": state.model, "ema": state.ema, "optimizer": state.optimizer}
    torch.save({"step": state.step} | {name: part.state_dict() for name, part in parts.items()}, path)
    return path


def damage(path: Path, how: str, weights: bytes) -> None:
    """Damage a file of a checkpoint that holds these bytes of weights."""
    data = bytearray(path.read_bytes())
    data[data.rindex(weights) + 2] ^= how == "flipped"
    if how == "missing":
        path.unlink()
        return
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"no zip", "flipped": data}[how])


def average_file(checkpoint: Path) -> Path:
    """The file of a checkpoint in which the averaged weights lie."""
    return next(checkpoint.glob("*model-00002-of-00003.safetensors"))


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "text", "flipped"])
@pytest.mark.parametrize("version", ["folder", "file"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, how, version):
    state = trained(tmp_path, 2, 4)
    path = tmp_path / "run" / "step_00000004"
    if version == "file":
        shutil.rmtree(path)
        path = as_file(state)
    if version == "file" and how == "missing":
        path.write_bytes(b"")
    else:
        damage(average_file(path) if path.is_dir() else path, how, state.ema.weight.numpy().tobytes())
    state = make_state(tmp_path)
    state.load()
    output = capsys.readouterr().out
    assert state.step == 2 and output.count("\n") == 1
    assert f"damaged checkpoint {path}" in output and "the run goes on from step_00000002" in output
    with state:  # the damaged one is replaced
        state.step = 4
        state.save()
    state.load()
    assert state.step == 4 and "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("summary", ["", "[]", "{}", '{"step": 4, "checksums": {}}', '{"checksums": {"a": ""}}'])
def test_damaged_summary_of_a_checkpoint_falls_back(tmp_path, capsys, summary):
    trained(tmp_path, 2, 4)
    (tmp_path / "run" / "step_00000004" / "checkpoint.json").write_text(summary)
    state = make_state(tmp_path)
    state.load()
    assert state.step == 2 and "step_00000004" in capsys.readouterr().out


def test_all_checkpoints_are_damaged(tmp_path):
    trained(tmp_path, 2, 4)
    for path in (tmp_path / "run").glob("step_*"):
        (path / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"step_00000004 .*step_00000002 .*delete it to start from step 0"):
        make_state(tmp_path).load()


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_only_finite_checkpoints_are_written_and_read(tmp_path, capsys, part):
    state = trained(tmp_path, 2)
    state.step = 3
    values = torch.load(as_file(state), weights_only=True)
    tensor = values["optimizer"]["state"][0]["exp_avg"] if part == "optimizer" else values[part]["weight"]
    tensor.flatten()[1] = float("nan")
    torch.save(values, tmp_path / "run" / "step_00000003.pt")  # by an earlier version
    again = make_state(tmp_path)
    again.load()
    assert again.step == 2 and "not finite" in capsys.readouterr().out

    getattr(state, part).load_state_dict(values[part])
    state.step = 4
    with pytest.raises(FloatingPointError, match="not finite at step 4, so no checkpoint is written"):
        state.save()
    assert not (tmp_path / "run" / "step_00000004").exists()


def test_disk_that_cannot_be_written_to_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    state = trained(tmp_path, 2)
    state.step = 3

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*step_00000003: \[Errno 28\] No space left on device"), state:
        state.save()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000002"]


def test_damaged_lines_of_metrics_are_named_and_left_out(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\xff\xfe}\n[1]\n{"step": 4}\n{"st'
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 4]
    output = capsys.readouterr().out
    assert [f"metrics.jsonl: line {n} is damaged and is left out" in output for n in (1, 2, 3, 4, 5)] == [
        False, True, True, False, False,
    ]  # fmt: skip
