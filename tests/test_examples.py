"""Every example runs with small inputs, and its docstring gives the command that runs it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import trimesh

from d3ds2.storage.model_folder import NETWORKS, network_names
from tests.support.tiny_model import draw_object
from tests.support.training_data import R, write_meshes
from tests.training.test_training_stages import CONFIGS
from training.config import load_config
from training.prepare_shapes import PrepareShapesConfig
from training.recipe import read_recipe
from training.render_views import RenderViewsConfig

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SHAPES = f"resolutions = [{R}]\nworkers = 1\n"
SCRIPTS = ("train_vae", "train_structure_vae", "train_structure_dit", "train_dit")
VIEWS = "views = 2\nsize = 64\nsupersample = 1\nworkers = 1\n"


def run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples():
    assert len(list(EXAMPLES.glob("*.py"))) == 4


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short_and_names_its_command(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60 and f"\npython docs/examples/{file.name} " in text.replace(
        "    python", "python"
    )
    assert f"def test_{file.stem}" in Path(__file__).read_text(encoding="utf-8")


def test_image_to_mesh(tmp_path):
    draw_object().save(tmp_path / "picture.png")
    assert "faces" in run("image_to_mesh", tmp_path, "picture.png", "mesh.glb", "2")
    assert len(trimesh.load(tmp_path / "mesh.glb", force="mesh").faces) > 100


def test_mesh_to_sdf_and_back(tmp_path):
    trimesh.creation.torus(1.0, 0.35).export(tmp_path / "torus.obj")
    assert "blocks" in run("mesh_to_sdf_and_back", tmp_path, "torus.obj", "closed.glb", "64")
    assert trimesh.load(tmp_path / "closed.glb", force="mesh").is_watertight


def test_attention_on_your_voxels(tmp_path):
    assert "out (" in run("attention_on_your_voxels", tmp_path, "16")


def write_small_configs(folder: Path) -> list[str]:
    """Write a folder of meshes and config files; return the arguments of the example that trains on them."""
    write_meshes(folder / "meshes")
    for name, text in (CONFIGS | {"shapes": SHAPES, "views": VIEWS}).items():
        text = text.format(name=name).replace("runs/", f"{folder}/runs/")
        (folder / f"small_{name}.toml").write_text(text)
    runs = [f"{script}.run.out_dir={folder}/runs/{script}" for script in SCRIPTS]
    return ["meshes", "mine", f"configs={folder}/small", *runs]


def test_train_on_a_folder_gives_each_script_its_settings(tmp_path, monkeypatch):
    """Check the three commands without running them; the next test runs them."""
    commands, example = [], runpy.run_path(str(EXAMPLES / "train_on_a_folder.py"))
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.chdir(tmp_path)
    example["main"](*write_small_configs(tmp_path))
    modules, (shapes, views, stages) = zip(*((module, rest) for _, _, module, *rest in commands), strict=True)
    assert modules == ("training.prepare_shapes", "training.render_views", "training")
    configs = [load_config(PrepareShapesConfig, shapes), load_config(RenderViewsConfig, views)]
    configs += [job.config for job in read_recipe(stages[0], stages[1:])]
    assert len(configs) == 7 and {config.data_dir for config in configs} == {str(tmp_path / "mine_data")}
    assert {config.meshes for config in configs[:2]} == {str(tmp_path / "meshes")}
    assert {config.model_dir for config in configs[2:]} == {str(tmp_path / "mine")}


@pytest.mark.long
def test_train_on_a_folder(tmp_path):
    out = run("train_on_a_folder", tmp_path, *write_small_configs(tmp_path))
    assert "trained: python -m d3ds2" in out and network_names(tmp_path / "mine") == set(NETWORKS)
