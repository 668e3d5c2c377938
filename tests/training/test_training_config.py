"""Configs come from a file, the command line overrides it, and errors name the full key."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from d3ds2.networks.structure_vae import StructureVAEConfig
from training.average_models import AverageModelsConfig
from training.config import load_config
from training.encode_latents import EncodeLatentsConfig
from training.help_text import help_text
from training.prepare_shapes import PrepareShapesConfig
from training.recipe import has_key
from training.render_views import RenderViewsConfig
from training.run import RunConfig
from training.train_dit import TrainDiTConfig
from training.train_structure_dit import TrainStructureDiTConfig
from training.train_structure_vae import TrainStructureVAEConfig
from training.train_vae import TrainVAEConfig

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@dataclass(frozen=True)
class Config:
    name: str = "a"
    sizes: tuple[int, ...] = (1,)
    pair: tuple[float, float] = (0.0, 1.0)
    bands: dict[str, float] | None = None
    kind: Literal["x", "y"] = "x"
    flag: bool = False
    run: RunConfig = field(default_factory=RunConfig)
    model: StructureVAEConfig = field(default_factory=StructureVAEConfig)


def load(tmp_path, toml, *overrides):
    (tmp_path / "c.toml").write_text(toml)
    return load_config(Config, [str(tmp_path / "c.toml"), *overrides])


def test_command_line_overrides_file(tmp_path):
    toml = 'name = "b"\nsizes = [1, 2]\n[run]\nsteps = 5\n[model]\nencoder_widths = [4, 8]\ndecoder_widths = [8, 4]\n'
    config = load(tmp_path, toml, "run.steps=7", "name=runs/x", "pair=[1, 2.5]", "flag=true", "bands={64 = 3}")
    assert (config.name, config.sizes, config.run.steps, config.pair) == ("runs/x", (1, 2), 7, (1.0, 2.5))
    assert config.model.encoder_widths == (4, 8) and config.flag is True and config.bands == {"64": 3.0}


@pytest.mark.parametrize(
    ("toml", "override", "message"),
    [
        pytest.param("", "run.step=1", r"unknown key run\.step of RunConfig", id="unknown-nested-key"),
        pytest.param("nam = 1", "flag=true", r"unknown key nam of Config; known: name, sizes", id="unknown-key"),
        pytest.param("", "run.steps=many", r"run\.steps: expected int, got 'many' \(str\)", id="str-for-int"),
        pytest.param("", "run.steps=1.5", r"run\.steps: expected int, got 1\.5", id="float-for-int"),
        pytest.param("", "run.steps=true", r"run\.steps: expected int, got True", id="bool-for-int"),
        pytest.param("", "sizes=[1, 'b']", r"sizes\[1\]: expected int", id="element"),
        pytest.param("", "pair=[1]", r"pair: expected tuple\[float, float\], got \[1\]", id="too-short"),
        pytest.param("", "kind=z", r"kind: expected one of 'x', 'y', got 'z'", id="not-a-choice"),
        pytest.param("", "model=3", r"model: expected a section \[model\], got 3", id="value-for-section"),
        pytest.param("name = 1", "name.x=3", "expected a section name", id="section-in-value"),
        pytest.param("", "flag", "expected an override as key=value, got 'flag'", id="no-equals"),
        pytest.param("name = ", "flag=true", "expected TOML in", id="not-toml"),
        pytest.param("", "model.threshold=2", "threshold between 0 and 1, got 2.0", id="dataclass-own-check"),
        pytest.param("", "run.save_every=0", r"expected run\.save_every >= 1, got 0", id="run-own-check"),
    ],
)
def test_errors_name_the_key(tmp_path, toml, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, toml, override)


def test_no_file_is_a_usage_line():
    with pytest.raises(SystemExit, match=r"usage: .* CONFIG\.toml \[key=value"):
        load_config(Config, [])


def test_help_tells_what_a_script_does_and_all_its_keys(capsys):
    with pytest.raises(SystemExit) as ended:
        load_config(TrainDiTConfig, ["some.toml", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith("Train the latent DiT")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        'data_dir = "data"',
        'run.out_dir = "runs/dit"',  # the script's own default, not that of RunConfig
        "run.learning_rate = 0.0001 # [A]",
        "model.pooled_conv = true",
        "sampling.fine.steps = 15",
    ):
        assert line in lines


@pytest.mark.parametrize("script", ["train_vae", pytest.param("evaluate", marks=pytest.mark.long)])
def test_help_needs_no_config_file(script):
    command = [sys.executable, "-m", f"training.{script}", "--help"]
    done = subprocess.run(command, cwd=CONFIGS.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "\n  data_dir" in done.stdout


@pytest.mark.parametrize(
    "config", [TrainVAEConfig(), TrainStructureDiTConfig(), TrainDiTConfig(), PrepareShapesConfig()]
)
def test_every_key_of_the_help_is_one_of_the_config(config):
    keys = re.findall(r"^  ([a-z_.0-9]+) +=", help_text(type(config)), re.MULTILINE)
    assert len(keys) > 8 and all(has_key(config, key) for key in keys)
    assert not has_key(config, "run.shadows") and not has_key(config, "data_dir.run")


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("tiny_shapes", PrepareShapesConfig),
        ("tiny_vae", TrainVAEConfig),
        ("tiny_structure_vae", TrainStructureVAEConfig),
        ("tiny_latents", EncodeLatentsConfig),
        ("tiny_structure_dit", TrainStructureDiTConfig),
        ("shipped_structure_dit", TrainStructureDiTConfig),
        ("average_models", AverageModelsConfig),
        ("tiny_dit", TrainDiTConfig),
        ("tiny_views", RenderViewsConfig),
        ("tiny_test_views", RenderViewsConfig),
    ],
)
def test_configs_of_the_models_load(name, cls):
    assert isinstance(load_config(cls, [str(CONFIGS / f"{name}.toml")]), cls)
