"""How a training script ends after an error: one line that names it, and exit code 1."""

import sys
from dataclasses import dataclass

import pytest

from training.command import run_command
from training.distributed import run_script


@dataclass(frozen=True)
class Config:
    steps: int = 1


@pytest.fixture
def toml(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("steps = 2")
    return str(file)


def needs_a_library(_config):
    raise ImportError("EVA transformers need timm (pip install timm): No module named 'timm'")


@pytest.mark.parametrize("error", [ValueError("bad"), OSError("full"), ImportError("pip install timm")])
def test_script_ends_with_one_line(toml, monkeypatch, error):
    def fail(_config):
        raise error

    monkeypatch.setattr(sys, "argv", ["script", toml])
    with pytest.raises(SystemExit, match=f"error: {error}"):
        run_command(fail, Config)


def test_trainer_ends_with_one_line(toml, capfd):
    with pytest.raises(SystemExit) as ended:
        run_script(needs_a_library, Config, [toml])
    errors = capfd.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in errors
    assert errors.splitlines() == ["error: EVA transformers need timm (pip install timm): No module named 'timm'"]


def test_debug_shows_the_traceback(toml, capfd):
    with pytest.raises(SystemExit):
        run_script(needs_a_library, Config, [toml, "--debug"])
    assert "Traceback" in capfd.readouterr().err
