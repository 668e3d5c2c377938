"""The boards on which a run can be watched."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from training.boards import open_boards
from training.run import Log, RunConfig, read_metrics


@pytest.mark.long
def test_wandb_keeps_a_run_in_its_folder_where_nobody_is_logged_in(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without a login of this user
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing may be asked"))
    out_dir = tmp_path / "a run"
    out_dir.mkdir()
    config = RunConfig(out_dir=str(out_dir), steps=2, log_every=1, tensorboard=False, wandb="test")
    with Log(config, 0) as log:
        log(1, {"loss": 2.0})
        log.note({"val_loss": 1.5})
        log.picture("validation", np.zeros((8, 8, 3), np.uint8), 2)
        log(2, {"loss": 1.0})
    assert "wandb is offline" in capsys.readouterr().out
    (kept,) = (out_dir / "wandb").glob("offline-run-*")
    content = b"".join(file.read_bytes() for file in kept.glob("run-*.wandb"))
    assert b"val_loss" in content and b"seconds_per_step" in content
    assert list(kept.rglob("*.png"))
    assert [record["loss"] for record in read_metrics(out_dir)] == [2.0, 1.0]
    wandb.teardown()


@pytest.mark.parametrize(("package", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_board_that_is_not_installed_is_named_and_training_goes_on(tmp_path, monkeypatch, capsys, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert open_boards(tmp_path, 0, package == "tensorboard", "x" if package == "wandb" else "") == []
    assert capsys.readouterr().out == f"{package} is not installed (pip install {package}): metrics do not go there\n"


def test_a_validation_is_written_with_its_own_step(tmp_path):
    config = RunConfig(out_dir=str(tmp_path), steps=10, log_every=4, tensorboard=False)
    with Log(config, 0) as log:
        for step in range(1, 9):
            if step == 6:
                log.note({"val_loss": 3.0}, seconds=5.0)
            log(step, {"loss": float(step)})
    lines = [json.loads(line) for line in Path(tmp_path, "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r.get("val_loss")) for r in lines] == [(4, 2.5, None), (6, 5.5, 3.0), (8, 7.5, None)]
    assert lines[1]["seconds_per_step"] < 0  # the seconds of the validation were made up, and are taken off
