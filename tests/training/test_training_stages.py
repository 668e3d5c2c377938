"""`python -m training` runs all stages of a model in order; it stops, fails and continues as it says."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from d3ds2.storage.model_folder import NETWORKS, network_names
from tests.support.training_data import R, prepared
from training.__main__ import main, plan
from training.run import read_metrics
from training.run_folder import newest_checkpoint

ROOT = Path(__file__).parents[2]
RUN = '[run]\ndevice = "cpu"\nsteps = 2\nlog_every = 1\ntensorboard = false\nout_dir = "runs/as_written_{name}"\n'
WIDTHS = "encoder_widths = [8, 16]\ndecoder_widths = [16, 8]\nencoder_res_blocks = 1\ndecoder_res_blocks = 1\n"
CONFIGS = {
    "vae": f"resolutions = [{R}]\nbatch_size = 2\n{RUN}"
    "[model]\nlatent_channels = 4\nhidden_size = 32\nnum_heads = 2\nencoder_depth = 1\ndecoder_depth = 1\n"
    "group_norm_groups = 2\n",
    "structure_vae": f"resolution = {R}\nbatch_size = 4\n{RUN}[model]\nlatent_channels = 2\n{WIDTHS}",
    "structure_dit": f"resolution = {R}\nbatch_size = 4\n{RUN}"
    "[image_encoder]\nimage_size = 28\npatch_size = 14\nhidden_size = 16\ndepth = 1\nnum_heads = 2\n"
    "[model]\nresolution = 2\nlatent_channels = 2\nhidden_size = 32\ndepth = 1\nnum_heads = 2\ncontext_size = 16\n",
    "latents": f'resolution = {R}\ndevice = "cpu"\n',
    "dit": f"resolution = {R}\nbatch_size = 4\n{RUN}"
    "[model]\nlatent_channels = 4\nhidden_size = 32\ndepth = 1\nnum_heads = 16\nnum_kv_heads = 1\n"
    "context_size = 16\ntop_k = 1\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with the config files small_vae.toml, ..."""
    for name, text in CONFIGS.items():
        (tmp_path / f"small_{name}.toml").write_text(text.format(name=name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(tmp_path_factory) -> str:
    return f"data_dir={prepared(tmp_path_factory)}"


class Started:
    """`python -m training small ...` in a forked process, which need not import everything; its stages are commands.

    Its output goes to files in `folder`/said.
    """

    def __init__(self, folder: Path, *overrides: str):
        self.files = [folder / "said" / name for name in ("out", "err")]
        self.files[0].parent.mkdir(exist_ok=True)
        arguments = ["small", "model_dir=models/mine", *overrides]
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(arguments,))
        self.process.start()

    def _run(self, arguments: list[str]) -> None:
        for number, file in enumerate(self.files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        os.environ["PYTHONPATH"] = str(ROOT)
        sys.exit(main(arguments))

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit code, the output and the errors."""
        self.process.join()
        return self.process.exitcode, *(file.read_text() for file in self.files)


def wait_for(path: Path, started: Started) -> None:
    """Wait until the process has written the first bytes of a file."""
    while not (path.is_file() and path.stat().st_size):
        assert started.process.is_alive(), started.end()
        time.sleep(0.05)


def fake_run(out_dir: str, model_dir: str, step: int) -> None:
    """Make a run folder with only the files that `plan` reads."""
    folder = Path(out_dir)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_dir": model_dir}))
    torch.save({}, folder / f"step_{step:08d}.pt")


def test_stopped_in_the_first_stage_then_trained_to_the_end_then_finished(folder, data):
    started = Started(folder, data, "train_vae.run.steps=1000000")
    run = folder / "runs" / "mine_vae"
    wait_for(run / "metrics.jsonl", started)
    started.process.terminate()
    code, output, _ = started.end()
    assert code == 143 and "stopped in train_vae; the same command continues from there" in output
    stopped_at = int(newest_checkpoint(run).stem[5:])
    assert 0 < stopped_at < 1000000 and network_names(folder / "models" / "mine") == {"sdf_vae"}

    steps = f"train_vae.run.steps={stopped_at + 2}"
    code, output, _ = Started(folder, data, steps).end()
    assert code == 0 and "[1/5] train_vae: 2 steps left, logs in runs/mine_vae" in output
    assert [record["step"] for record in read_metrics(run)] == list(range(1, stopped_at + 3))
    assert network_names(folder / "models" / "mine") == set(NETWORKS)
    for name in ("structure_vae", "structure_dit", "dit"):
        assert len(read_metrics(folder / "runs" / f"mine_{name}")) == 2

    def files() -> dict[Path, int]:
        made = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "said")
        return {path: path.stat().st_mtime_ns for path in made}

    made = files()
    code, output, _ = Started(folder, data, steps).end()
    assert code == 0 and output.count(": finished, ") == 4
    assert "are up to date" in output and "to train it again" not in output
    assert made == files()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_stage_ends_where_the_whole_is_killed(folder, data):
    started = Started(folder, data, "train_vae.run.steps=1000000")
    run = folder / "runs" / "mine_vae"
    wait_for(run / "metrics.jsonl", started)
    assert (run / "training.lock").is_file()
    started.process.kill()
    started.process.join()
    while (run / "training.lock").is_file():  # for ever, if the stage trains on
        time.sleep(0.05)
    stopped_at = int(newest_checkpoint(run).stem[5:])
    assert 0 < stopped_at < 1000000 and network_names(folder / "models" / "mine") == {"sdf_vae"}


def test_a_failing_stage_ends_the_whole_with_its_exit_code(folder, data):
    code, output, errors = Started(folder, data, "train_vae.max_tokens=1").end()
    assert code == 1 and "expected items of at most 1 tokens" in errors
    assert "train_vae failed with exit code 1, see above; fix the cause and run the same command to continue" in output
    assert "[2/5]" not in output and not Path("runs/mine_structure_vae").exists()


def test_overrides_reach_the_stages_that_know_them(folder, data):
    jobs = plan("small", [data, "run.steps=7", "train_dit.run.steps=9", "model_dir=a/b", "views_per_shape=2"])
    configs = {job.stage.script: job.config for job in jobs}
    assert [getattr(config, "views_per_shape", None) for config in configs.values()] == [None, None, 2, None, 2]
    assert [configs[f"train_{name}"].run.steps for name in ("vae", "structure_vae", "dit")] == [7, 7, 9]
    assert configs["encode_latents"].model_dir == "a/b" and configs["train_vae"].run.out_dir == "runs/b_vae"
    assert plan("small", [data])[0].config.run.out_dir == "runs/as_written_vae"
    given = plan("small", [data, "model_dir=a/b", "train_dit.run.out_dir=elsewhere"])
    assert [job.config.run.out_dir for job in given if job.steps_left] == [
        *(f"runs/b_{name}" for name in ("vae", "structure_vae", "structure_dit")),
        "elsewhere",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["run.step=3"], "no stage has the key of run.step=3", id="unknown-key"),
        pytest.param(["train_vae.views_per_shape=3"], "no stage has the key of train_vae.views", id="of-another-stage"),
        pytest.param(["train_dit.run.steps=x"], "run.steps: expected int, got 'x'", id="wrong-type"),
        pytest.param(["data_dir"], "expected an override as key=value, got 'data_dir'", id="no-equals"),
        pytest.param(["run.out_dir=x"], "train_vae and train_structure_vae have the same run.out_dir x", id="shared"),
        pytest.param(["model_dir=b/two"], "runs/two_vae is a run of the model a/two, not of b/two", id="another-model"),
        pytest.param(["model_dir=a/two"], "a/two has no sdf_vae: delete runs/two_vae to train it again", id="gone"),
        pytest.param(["data_dir=none"], "expected none/index.json; make it with python -m training", id="no-shapes"),
        pytest.param(["data_dir=plain"], "make them with python -m training.render_views", id="no-pictures"),
    ],
)
def test_errors_come_before_anything_runs(folder, data, capfd, overrides, message):
    fake_run("runs/two_vae", "a/two", step=2)
    Path("plain").mkdir()
    Path("plain/index.json").write_bytes(Path(data.removeprefix("data_dir="), "index.json").read_bytes())
    assert main(["small", data, *overrides]) == 2
    output, errors = capfd.readouterr()
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1 and not output
    assert [path.name for path in Path("runs").iterdir()] == ["two_vae"]


def test_config_files_are_missing(capsys):
    assert main(["training/configs/none", "run.steps=1"]) == 2
    assert "expected a config file training/configs/none_vae.toml; give the part before" in capsys.readouterr().err


@pytest.mark.long
def test_a_stage_that_learned_from_what_has_changed_since_is_named(folder, data):
    model = folder / "models" / "mine"
    model.mkdir(parents=True)
    for name in ("structure_vae", "structure_dit", "dit"):
        fake_run(f"runs/mine_{name}", "models/mine", step=2)
        (model / f"{'latent_dit' if name == 'dit' else name}.safetensors").touch()
    _, output, _ = Started(folder, data).end()
    line = "before train_vae went on: delete runs/mine_dit to train it again"
    assert f"[5/5] train_dit: finished, 2 steps\n  {line}" in output and output.count("to train it again") == 1
