"""kill -9 at 60 random moments over all stages: nothing is lost, and the run ends as one without a kill."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.training_chain import Chain, copy_model
from tests.support.training_data import R, prepared, write_meshes
from tests.training.test_distributed import STAGES, configs_in, difference, train_alone
from training import encode_latents
from training.distributed import run_ranks
from training.prepare_shapes import PrepareShapesConfig
from training.prepare_shapes import main as prepare_shapes
from training.run import read_metrics
from training.run_folder import LEFTOVERS

pytestmark = pytest.mark.long
KILLS = 10  # of each of the six stages


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    """A model folder from which each stage can start."""
    return train_alone(Chain(prepared(tmp_path_factory), tmp_path_factory.mktemp("kills")))


def begin(work: Callable[[], object], errors: Path) -> multiprocessing.Process:
    """Start work in a forked process, whose errors go to a file."""

    def run() -> None:
        os.setsid()  # with its own children
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        run_ranks(work)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def kill_often(work: Callable[[], object], errors: Path, seconds: float) -> None:
    """Start work again and again, kill it at random moments, and then let it end."""
    moments = random.Random(0)
    for _ in range(KILLS):
        process = begin(work, errors)
        process.join(moments.uniform(0.0, 0.5) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL), errors.read_text()
    last = begin(work, errors)
    last.join()
    assert last.exitcode == 0 and "Traceback" not in errors.read_text()


def leftovers(folder: Path) -> list[Path]:
    return [path for pattern in (*LEFTOVERS, "*.lock") for path in folder.glob(pattern)]


@pytest.mark.parametrize("name", STAGES)
def test_killed_trainers_end_as_one_that_was_not_killed(chain, tmp_path, name):
    module = STAGES[name][0]
    whole, killed = (configs_in(chain, tmp_path / n, steps=24, save_every=2)[name] for n in ("whole", "killed"))
    began = time.monotonic()
    begin(lambda: module.train(whole), tmp_path / "errors").join()
    kill_often(lambda: module.train(killed), tmp_path / "errors", time.monotonic() - began)
    one, two = (Path(config.run.out_dir) for config in (whole, killed))
    assert difference(one, two, "model") == difference(one, two, "ema") == difference(one, two, "optimizer") == 0
    assert [record["loss"] for record in read_metrics(one)] == [record["loss"] for record in read_metrics(two)]
    models = [Path(config.model_dir) for config in (whole, killed)]
    for file in models[0].iterdir():
        assert file.read_bytes() == (models[1] / file.name).read_bytes(), file
    assert not leftovers(two) and not leftovers(models[1])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_encoding_ends_as_one_that_was_not_killed(chain, tmp_path):
    shutil.copytree(chain.data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("latents"))
    copy_model(chain, tmp_path, "sdf_vae")
    config = dataclasses.replace(
        chain.latents, data_dir=str(tmp_path / "data"), model_dir=str(tmp_path / "model"), max_tokens=10
    )
    began = time.monotonic()
    begin(lambda: encode_latents.main(config), tmp_path / "errors").join()
    seconds = time.monotonic() - began
    expected, settings = files_of(tmp_path / "data" / "latents"), (tmp_path / "model" / "config.json").read_text()
    shutil.rmtree(tmp_path / "data" / "latents")
    shutil.rmtree(tmp_path / "model")
    copy_model(chain, tmp_path, "sdf_vae")
    kill_often(lambda: encode_latents.main(config), tmp_path / "errors", seconds)
    found = files_of(tmp_path / "data" / "latents")
    assert {name: data for name, data in found.items() if not Path(name).name.startswith(".")} == expected
    assert (tmp_path / "model" / "config.json").read_text() == settings


def test_killed_preparation_ends_as_one_that_was_not_killed(tmp_path):
    write_meshes(tmp_path / "meshes")
    whole, killed = (
        PrepareShapesConfig(
            meshes=str(tmp_path / "meshes"), data_dir=str(tmp_path / name), resolutions=(R, 64), workers=1
        )
        for name in ("whole", "killed")
    )
    began = time.monotonic()
    begin(lambda: prepare_shapes(whole), tmp_path / "errors").join()
    kill_often(lambda: prepare_shapes(killed), tmp_path / "errors", time.monotonic() - began)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
