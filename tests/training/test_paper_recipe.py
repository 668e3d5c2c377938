"""The paper's recipe: its numbers, and all of its stages in one command on small networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from d3ds2.networks.model_files import load_network
from d3ds2.pipeline import load_pipeline
from d3ds2.storage.model_folder import SamplingConfig, network_names
from tests.support.small_recipe import HIGH, LOW, RESOLUTIONS, small_recipe
from training.__main__ import main
from training.recipe import read_recipe, stages_of
from training.run import read_metrics

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "training" / "configs" / "paper"
STAGES = [stage.name for stage in stages_of(str(PAPER))]


def job_of(name: str, *overrides: str):
    return next(job for job in read_recipe(str(PAPER), [*overrides]) if job.stage.name == name)


def test_the_recipe_has_the_numbers_of_the_paper():
    dits = [job_of(f"train_dit_{R}").config for R in (256, 384, 512, 1024)]
    assert [dit.resolution for dit in dits] == [256, 384, 512, 1024]
    assert [dit.run.learning_rate for dit in dits] == [1e-4, 1e-4, 5e-5, 2e-5]
    assert [dit.batch_size for dit in dits] == [64, 64, 64, 16]
    assert all((dit.model.hidden_size, dit.model.depth, dit.model.num_heads) == (1024, 24, 32) for dit in dits)
    coarse, fine = (job_of(f"train_vae_{R}").config for R in (512, 1024))
    assert (coarse.resolutions, coarse.batch_size, coarse.run.learning_rate) == ((256, 384, 512), 32, 1e-4)
    assert (fine.resolutions, fine.batch_size, fine.run.learning_rate) == ((1024,), 8, 1e-5)
    assert (fine.crop, fine.crop_margin, coarse.crop) == (32, 4, 0)
    views = job_of("render_views").config
    assert (views.views, views.size, views.elevation, views.focal_mm) == (45, 1024, (10, 40), (30, 100))
    assert dits[2].sampling == SamplingConfig(sdf_resolution=512) and dits[3].sampling.fine.steps == 15


def test_a_stage_starts_from_what_the_one_before_has_written():
    jobs = {job.stage.name: job for job in read_recipe(str(PAPER), ["model_dir=some/mine/"])}
    for before, after in (
        ("train_vae_512", "train_vae_1024"),
        ("train_vae_1024", "train_dit_1024"),
        ("train_structure_vae", "train_structure_dit"),
        *(("train_dit_256", "train_dit_384"), ("train_dit_384", "train_dit_512"), ("train_dit_512", "train_dit_1024")),
    ):
        assert jobs[before].writes in jobs[after].reads
    written = [job.writes for job in jobs.values() if job.writes]
    assert len({*written}) == len(written) and Path("some/mine/fine_latent_dit") in written
    assert jobs["train_dit_384"].config.run.start_from == "some/mine_256"
    assert jobs["train_dit_384"].config.run.out_dir == "runs/mine_dit_384"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param([], "expected config files such as 01_prepare_shapes.toml in", id="empty"),
        pytest.param(["01_train_all.toml"], "expected a name such as 01_train_vae.toml", id="no-script"),
        pytest.param(["train_vae.toml"], "expected a name such as 01_train_vae.toml", id="no-number"),
    ],
)
def test_a_folder_that_is_no_recipe_is_one_line(tmp_path, capsys, files, message):
    for file in files:
        (tmp_path / file).touch()
    assert main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_a_missing_image_encoder_is_an_error_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(PAPER)]) == 2
    assert "expected a pretrained image encoder in models/dinov2-with-registers-large" in capsys.readouterr().err
    assert main([str(PAPER), "pretrained_encoder=", "meshes=none"]) == 2
    assert "none" in capsys.readouterr().err and not any(tmp_path.iterdir())


# --- all stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with two meshes."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "meshes").mkdir()
    for name, mesh in (
        ("ball", trimesh.creation.icosphere(subdivisions=2)),
        ("box", trimesh.creation.box((1.0, 0.6, 1.4))),
    ):
        mesh.export(folder / "meshes" / f"{name}.obj")
    records = [{"file": f"{name}.obj", "source": "made", "split": "train"} for name in ("ball", "box")]
    (folder / "meshes" / "index.json").write_text(json.dumps(records))
    return folder


def run_recipe(folder: Path, *command: str, **options) -> subprocess.CompletedProcess:
    arguments = [str(PAPER), "meshes=meshes", "data_dir=data", "model_dir=models/mine", *small_recipe(**options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command, "training", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_all_stages_of_the_recipe_end_in_a_model_of_two_stages(folder):
    done = run_recipe(folder, steps=3)
    assert done.returncode == 0, done.stdout + done.stderr
    heads = [line.partition("] ")[2].partition(":")[0] for line in done.stdout.splitlines() if line.startswith("[")]
    assert heads == STAGES
    model = folder / "models" / "mine"
    assert {"latent_dit", "sdf_vae", "fine_latent_dit", "fine_sdf_vae"} <= network_names(model)

    pipeline = load_pipeline(model)
    assert [stage.sdf_resolution for stage in pipeline.stages] == [LOW, HIGH]
    assert [stage.latent_dit.config.position_factor for stage in pipeline.stages] == [1.0, 0.5]
    picture = Image.open(folder / "data" / "views" / "ball" / "000.png")
    structure = pipeline.structure_of([trimesh.creation.icosphere(subdivisions=2)])
    tokens = pipeline.encode_image([picture])
    latents = pipeline.sample_latents(structure, tokens, [0])
    blocks = pipeline.decode_blocks(latents, structure)
    assert blocks.resolution == HIGH and blocks.values.isfinite().all()
    mesh = pipeline.blocks_to_meshes(blocks, level=float(blocks.values.median()))[0]
    assert len(mesh.faces) and np.isfinite(mesh.vertices).all()

    again = run_recipe(folder, steps=3)
    assert again.returncode == 0 and again.stdout.count(": finished, 3 steps") == 8, again.stdout + again.stderr
    assert again.stdout.count("up to date") == 4 and "train it again" not in again.stdout
    scales = [load_network(model, name).config.latents_scale for name in ("sdf_vae", "fine_sdf_vae")]
    moments = [json.loads((folder / f"data/latents/{R}/moments.json").read_text()) for R in (LOW, HIGH)]
    assert scales == [moment["latents_scale"] for moment in moments]


@pytest.mark.long
def test_under_torchrun_all_ranks_share_each_stage(folder):
    """Continues the run above on two ranks, or starts it."""
    done = run_recipe(folder, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", steps=4)
    assert done.returncode == 0, done.stdout + done.stderr
    for job in read_recipe(str(PAPER), ["model_dir=models/mine", *small_recipe(4)]):
        if job.run is not None:
            assert read_metrics(folder / job.run.out_dir)[-1]["step"] == 4
    assert (folder / "data" / "index.1-of-2.json").is_file() and done.stdout.count(f"[1/{len(STAGES)}]") == 1
    assert torch.equal(*(load_network(folder / "models" / "mine", "sdf_vae").decoder.out_layer.weight for _ in "ab"))


def test_small_overrides_reach_every_stage():
    jobs = read_recipe(str(PAPER), small_recipe(3))
    assert [job.config.resolution for job in jobs if job.stage.script == "train_dit"] == [*RESOLUTIONS.values()]
    assert all(job.run.steps == 3 for job in jobs if job.run is not None)
