"""Ranks and parts: any number of them trains as one process does; the death of one ends all."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training_chain import Chain, copy_model
from tests.support.training_data import R, prepared, write_toml
from training import distributed, encode_latents, loop, train_dit, train_structure_dit, train_structure_vae, train_vae
from training.checkpoints import fault_of, open_checkpoint, read_into
from training.data.datasets import Shapes, Structures, StructureViews
from training.data.latent_moments import moments_path
from training.data.latent_views import LatentViews
from training.data.loading import load_batches
from training.data.parts import Parts, split
from training.data.shape_files import list_shapes, read_arrays
from training.data.views import Views
from training.distributed import Ranks, run_ranks
from training.folder_lock import locked
from training.losses import SDF_TERMS, SDFLossConfig, StructureLossConfig, SurfaceLossConfig, count_sdf, sdf_loss
from training.run import read_metrics
from training.run_folder import checkpoints, newest_checkpoint

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STAGES = {  # script, its module, and the networks it needs
    "structure_vae": (train_structure_vae, ()),
    "structure_dit": (train_structure_dit, ("structure_vae",)),
    "vae": (train_vae, ()),
    "dit": (train_dit, ("sdf_vae", "image_encoder")),
}
STEPS = [4, pytest.param(20, marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    """A model folder from which each stage can start."""
    return train_alone(Chain(prepared(tmp_path_factory), tmp_path_factory.mktemp("ranks")))


def train_alone(chain: Chain) -> Chain:
    """Train each stage for two steps in this process."""
    for name, (module, _) in STAGES.items():
        if name == "dit":
            encode_latents.main(chain.latents)
        module.train(set_run(getattr(chain, name), steps=2))
    return chain


def set_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def configs_in(chain: Chain, folder: Path, **run) -> dict:
    """The config of each stage, in its own folder; the networks that it needs are those of the chain.

    A gradient that is zero but for rounding, such as that of a bias of keys, moves a weight by up to the learning rate,
    one way or the other. So the rate is moderate.
    """
    configs = {}
    for name, (_, needs) in STAGES.items():
        here = folder / name
        if not here.exists():
            here.mkdir(parents=True)
            copy_model(chain, here, *needs)
        config = dataclasses.replace(getattr(chain, name), model_dir=str(here / "model"))
        if name == "dit":
            surface = SurfaceLossConfig(share=0.6, sign=0.2, slope=1.0, surplus=True)
            loss = dataclasses.replace(config.loss, noise_alone=1.0)
            config = dataclasses.replace(config, surface=surface, loss=loss, imperfect_structures=True)
        if name == "structure_dit":
            loss, occupancy = dataclasses.replace(config.loss, noise_alone=0.6), StructureLossConfig(dice=0.5)
            config = dataclasses.replace(config, loss=loss, occupancy=occupancy, train_structure_decoder=True)
        configs[name] = set_run(config, out_dir=str(here / "run"), workers=0, learning_rate=1e-3, **run)
    return configs


def torchrun(ranks: int, folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a module on several ranks, whose output goes to files in `folder`/logs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", str(folder / "logs"), "--redirects", "3", "-m", module, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def errors_of(folder: Path) -> str:
    """The errors that the ranks of the newest torchrun wrote."""
    newest = max((folder / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return "".join(path.read_text() for path in sorted(newest.rglob("stderr.log")))


def on_ranks(ranks: int, work: Callable[[], object], exits: list[int] | None = None) -> None:
    """Do some work on forked ranks, which need not import everything again as those of torchrun.

    They must end with these exit codes, all 0 unless given.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def begin(rank: int) -> None:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        run_ranks(work)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=begin, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == (exits or [0] * ranks)


def train_all(chain: Chain, folder: Path, ranks: int, **run) -> None:
    """Train every stage on some ranks, or in this process for one."""
    configs = configs_in(chain, folder, **run)

    def work() -> None:
        for name, config in configs.items():
            STAGES[name][0].train(config)

    on_ranks(ranks, work) if ranks > 1 else work()


def difference(folder: Path, other: Path, part: str) -> float:
    """The relative difference of all weights in the newest checkpoints of two runs."""
    one, two = (newest_checkpoint(f) for f in (folder, other))
    assert one.name == two.name
    a, b = (torch.cat([t.flatten().double() for t in read_part(path, part).values()]) for path in (one, two))
    return ((a - b).norm() / a.norm()).item()


def read_part(path: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part of a checkpoint, such as "model"."""
    assert fault_of(path) == ""
    shapes = open_checkpoint(path, []).shapes
    tensors = {name: torch.full(shapes[name], torch.nan) for name in sorted(shapes) if name.startswith(f"{part}.")}
    read_into(path, tensors)
    return tensors


def assert_equal_runs(folder: Path, other: Path) -> None:
    for name in STAGES:
        one, two = folder / name / "run", other / name / "run"
        assert difference(one, two, "model") < 1e-5 and difference(one, two, "ema") < 1e-5, name
        for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
            assert a.keys() == b.keys()
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), (name, a["step"])
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2), (name, a["step"])
            assert a.get("tokens") == b.get("tokens")


@pytest.mark.parametrize("steps", STEPS)
def test_ranks_and_parts_train_as_one_process(chain, tmp_path, steps):
    """Any ranks, parts and shards end with the weights of one rank with whole batches.

    2 ranks × 2 parts, and 2 sharded → 1 rank; with more steps also 1 × 4, 4 × 1, 2 sharded, 2 sharded → 1 → 4, and
    1 → 2 → 4 sharded.
    """
    train_all(chain, tmp_path / "whole", 1, steps=steps)
    train_all(chain, tmp_path / "2x2", 2, steps=steps, accumulate=2)
    for ranks, until in ((2, steps // 2), (1, steps)):
        train_all(chain, tmp_path / "2 sharded, 1", ranks, steps=until, sharded=ranks == 2)
    if steps > 4:
        train_all(chain, tmp_path / "1x4", 1, steps=steps, accumulate=4)
        train_all(chain, tmp_path / "4x1", 4, steps=steps)
        train_all(chain, tmp_path / "sharded", 2, steps=steps, sharded=True)
        for ranks, until in ((2, steps // 4), (1, steps // 2), (4, steps)):
            train_all(chain, tmp_path / "resumed", ranks, steps=until, sharded=ranks == 2)
        for ranks, until in ((1, steps // 4), (2, steps // 2), (4, steps)):
            train_all(chain, tmp_path / "resharded", ranks, steps=until, sharded=ranks > 1)
    for name in sorted(path.name for path in tmp_path.iterdir()):
        assert_equal_runs(tmp_path / "whole", tmp_path / name)


@pytest.mark.long
def test_shards_are_validated_and_frozen_as_whole_weights(chain, tmp_path):
    """The first rank alone draws pictures in a validation. An image encoder is frozen on the way."""

    def train_both(folder: Path, **run) -> None:
        train_vae.train(configs_in(chain, folder, steps=4, validate_every=2, validate_pictures=1, **run)["vae"])
        config = configs_in(chain, folder, steps=4, validate_every=0, **run)["structure_dit"]
        train_structure_dit.train(dataclasses.replace(config, image_encoder_steps=2))

    train_both(tmp_path / "whole")
    configs_in(chain, tmp_path / "sharded")  # its folders, which two ranks would make at once
    on_ranks(2, lambda: train_both(tmp_path / "sharded", sharded=True))
    for name in ("structure_dit", "vae"):
        one, two = (tmp_path / folder / name / "run" for folder in ("whole", "sharded"))
        assert difference(one, two, "model") < 1e-5 and difference(one, two, "ema") < 1e-5
        for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
            assert ("val_loss" in a) == ("val_loss" in b) == (name == "vae" and a["step"] % 2 == 0)
            assert a.get("val_loss", 0.0) == pytest.approx(b.get("val_loss", 0.0), rel=1e-4)


def test_death_of_a_rank_ends_all_and_the_run_goes_on(chain, tmp_path):
    whole, parts = (configs_in(chain, tmp_path / n, steps=6, save_every=2)["vae"] for n in ("whole", "parts"))
    on_ranks(2, lambda: train_vae.train(whole))
    write_toml(tmp_path / "vae.toml", parts)
    killed = torchrun(2, tmp_path, "tests.support.train_vae_and_die", str(tmp_path / "vae.toml"), "1", "5")
    errors = errors_of(tmp_path)
    assert killed.returncode != 0 and "Traceback" not in errors
    assert errors.count("error: ") == 1
    line = "error: rank 0 ends, because another has; the same command continues from the newest checkpoint\n"
    assert line in errors
    run = Path(parts.run.out_dir)
    names = [path.name for path in checkpoints(run)]
    assert names in (["step_00000002"], ["step_00000004", "step_00000002"])  # the newest may have been in the making
    assert not (run / "training.lock").exists()

    on_ranks(2, lambda: train_vae.train(parts))
    assert difference(Path(whole.run.out_dir), run, "model") == 0
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 7))


def test_every_rank_says_that_another_has_died_and_ends_although_its_device_waits(monkeypatch, capfd):
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.5)

    def work() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # as if in a sum on the device, which waits for rank 1

    on_ranks(3, work, [1, -signal.SIGKILL, 1])
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and errors.count("\n") == 2
    for rank in (0, 2):
        assert f"error: rank {rank} ends, because another has; the same command continues from" in errors


def test_error_of_all_ranks_is_one_line(chain, tmp_path, capfd):
    config = dataclasses.replace(configs_in(chain, tmp_path, steps=6)["vae"], max_tokens=1)
    on_ranks(2, lambda: train_vae.train(config), [1, 1])
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert errors.count("error: ") == errors.count("error: expected items of at most 1 tokens") == 1


def test_second_run_of_several_ranks_is_refused_in_one_line(chain, tmp_path, capfd):
    config = configs_in(chain, tmp_path, steps=6)["vae"]
    Path(config.run.out_dir).mkdir()
    with locked(config.run.out_dir):
        on_ranks(2, lambda: train_vae.train(config), [1, 1])
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and errors.count("error: ") == 1
    assert f"run is in use by process {os.getpid()} on" in errors


def test_signal_to_one_rank_stops_all(chain, tmp_path):
    config = configs_in(chain, tmp_path, steps=100_000)["structure_vae"]

    def signalled() -> None:
        loop.Log = signalling(loop.Log)
        train_structure_vae.train(config)

    on_ranks(2, signalled)
    assert [path.name for path in Path(config.run.out_dir).glob("*step*")] == ["step_00000003"]
    assert read_metrics(config.run.out_dir)[-1]["step"] == 3


def signalling(log: type) -> type:
    """A log in which the second rank gets SIGTERM after step 3."""

    class Log(log):
        def __call__(self, step, metrics):
            super().__call__(step, metrics)
            if step == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    return Log


# --- parts


def test_split_deals_every_sample_once_and_balances_tokens():
    rng = np.random.default_rng(0)
    for parts in (1, 2, 3, 8):
        sizes = rng.integers(1, 100, size=40)
        dealt = split(sizes, parts)
        assert sorted(itertools.chain(*(samples.tolist() for samples in dealt))) == list(range(40))
        assert all((np.diff(samples) > 0).all() for samples in dealt)
        totals = [sizes[samples].sum() for samples in dealt]
        assert max(totals) - min(totals) <= sizes.max()
    assert [samples.tolist() for samples in split(np.array([5, 5]), 3)] == [[0], [1], []]
    assert [len(samples) for samples in split(np.ones(8, dtype=int), 4)] == [2, 2, 2, 2]


def make_datasets(chain: Chain) -> dict:
    names, tokens = list_shapes(chain.data_dir, "train", R)
    views = Views(chain.data_dir, names, 28)
    return {
        "shapes": Shapes(chain.data_dir, "train", (R,), 5, 10_000, 0, (0, 3)),
        "structures": Structures(chain.data_dir, names, R, 5, 0, (0, 4)),
        "structure_views": StructureViews(views, 6, 2, seed=0),
        "latent_views": LatentViews(chain.data_dir, R, views, tokens, 6, 2, 10_000, seed=0),
    }


@pytest.mark.parametrize("name", ["shapes", "structures", "structure_views", "latent_views"])
def test_parts_are_the_samples_of_the_whole_batch(chain, name):
    dataset, step = make_datasets(chain)[name], 3
    whole = dataset[step]
    for ranks, accumulate in ((1, 4), (2, 1), (4, 2)):
        seen = []
        for rank in range(ranks):
            parts = Parts(dataset, Ranks(CPU, rank, ranks), accumulate)
            for index in range(step * accumulate, (step + 1) * accumulate):
                part = parts[index]
                if part.batch is None:
                    continue
                samples, tokens, batch = part.cut.samples, part.cut.tokens, part.batch
                seen += samples.tolist()
                if name == "structures":
                    assert torch.equal(batch, whole[samples])
                elif name == "shapes":
                    assert torch.equal(batch.sdf, whole.sdf[tokens]) and batch.batch_size == len(samples)
                else:
                    assert torch.equal(batch.images, whole.images[samples])
                if name == "latent_views":
                    assert torch.equal(batch.mean, whole.mean[tokens])
        assert sorted(seen) == list(range(len(seen))) and seen


def test_parts_take_their_rows_of_the_random_numbers(chain):
    dataset = make_datasets(chain)["latent_views"]
    [part] = itertools.islice(load_batches(Parts(dataset, Ranks(CPU, 1, 3), 1), 2, 3, 0, CPU), 1)
    whole = torch.randn((part.cut.num_tokens, 4), generator=torch.Generator().manual_seed(5))
    drawn = part.draw_tokens(
        len(part.batch.mean), lambda M: torch.randn((M, 4), generator=torch.Generator().manual_seed(5))
    )
    assert torch.equal(drawn, whole[part.cut.tokens])


def test_samples_that_differ_from_the_index(chain, monkeypatch):
    """A damaged file may be replaced by a smaller shape; a larger one shows that the index is out of date."""
    dataset = make_datasets(chain)["shapes"]
    real = dataset.sizes(2)
    monkeypatch.setattr(dataset, "sizes", lambda step: real + 3)
    parts = [Parts(dataset, Ranks(CPU, rank, 2), 1)[2] for rank in range(2)]
    for part in parts:
        assert len(part.cut.tokens) == len(part.batch.block_coords) and part.cut.num_tokens == real.sum() + 15
    assert len(set(torch.cat([part.cut.tokens for part in parts]).tolist())) == real.sum()
    monkeypatch.setattr(dataset, "sizes", lambda step: real - 1)
    with pytest.raises(ValueError, match=r"sample 0 of step 2 has \d+ tokens, but the index says \d+: prepare"):
        Parts(dataset, Ranks(CPU), 1)[2]


def test_shares_of_sdf_losses_add_up_to_that_of_the_whole_batch():
    torch.manual_seed(0)
    sdf, target = torch.rand(60) * 2 - 1, (torch.randn(60)).clamp(-1, 1)
    sharp, mean, logvar = torch.rand(60) < 0.1, torch.randn(6, 4), torch.randn(6, 4)
    whole = sdf_loss(sdf, target, sharp, mean, logvar, SDFLossConfig(sign=0.5))
    cuts = [(slice(0, 10), slice(0, 1)), (slice(10, 60), slice(1, 6))]
    counts = [count_sdf(target[v], sharp[v], len(mean[t])) for v, t in cuts]
    shares = [dict(zip(SDF_TERMS, (c / sum(counts)).float(), strict=True)) for c in counts]
    parts = [
        sdf_loss(sdf[v], target[v], sharp[v], mean[t], logvar[t], SDFLossConfig(sign=0.5), share)
        for (v, t), share in zip(cuts, shares, strict=True)
    ]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-5)


def test_ranks_encode_the_latents_together(chain, tmp_path):
    """The files and the scale are those of one process."""
    data = tmp_path / "data"
    shutil.copytree(chain.data_dir, data)
    copy_model(chain, tmp_path, "sdf_vae")
    one = encode_latents.main(chain.latents)
    shutil.rmtree(data / "latents")
    config = dataclasses.replace(chain.latents, data_dir=str(data), model_dir=str(tmp_path / "model"))
    on_ranks(2, lambda: encode_latents.main(config))
    two = json.loads(moments_path(data, R).read_text())
    assert two["latents_scale"] == pytest.approx(one["latents_scale"])
    files = {path.name: path for path in moments_path(chain.data_dir, R).parent.glob("*.safetensors")}
    assert len(files) == 5 * 8
    for name, path in files.items():
        pair = [read_arrays(p, "coords", "mean") for p in (path, moments_path(data, R).parent / name)]
        assert all(np.array_equal(a, b) for a, b in zip(*pair, strict=True))
