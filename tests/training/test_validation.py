"""Validation while a run trains: comparable losses, pictures, speeds, and a training that does not notice it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from tests.support.training_chain import Chain
from tests.support.training_data import prepared
from training import train_dit, train_structure_dit, train_structure_vae, train_vae
from training.distributed import Ranks
from training.encode_latents import main as encode_latents
from training.run import Log, RunConfig, read_metrics
from training.speed import peak_flops, speeds, token_weights
from training.validation import Validation, batches_of

STEPS, EVERY = 3, 2
TRAINERS = {
    "structure_vae": train_structure_vae.train,
    "structure_dit": train_structure_dit.train,
    "vae": train_vae.train,
    "dit": train_dit.train,
}


def run_all(chain: Chain, **changes) -> dict:
    """Train all networks for a few steps; return their averages by name."""
    averages = {}
    for name, train in TRAINERS.items():
        if name == "dit":
            encode_latents(chain.latents)
        config = getattr(chain, name)
        run = dataclasses.replace(config.run, steps=STEPS, workers=0, **changes)
        averages[name] = train(dataclasses.replace(config, run=run))
    return averages


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Chain, dict, dict]:
    """A chain with validation, its averages, and those of the same chain without."""
    pytest.importorskip("tensorboard")
    watched, plain = (Chain(prepared(tmp_path_factory), tmp_path_factory.mktemp(name)) for name in ("watched", "plain"))
    seen = run_all(watched, validate_every=EVERY, validate_pictures=1, tensorboard=True)
    return watched, seen, run_all(plain, validate_every=0)


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINERS)
def test_training_does_not_notice_validation(runs, name):
    _, watched, plain = runs
    for a, b in zip(watched[name].parameters(), plain[name].parameters(), strict=True):
        assert torch.equal(a, b)
    assert watched[name].training == plain[name].training


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINERS)
def test_losses_and_pictures_reach_the_records_and_the_board(runs, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = runs[0].folder / name
    found = {r["step"]: r["val_loss"] for r in read_metrics(folder) if "val_loss" in r}
    assert list(found) == [EVERY] and all(np.isfinite(list(found.values())))
    board = EventAccumulator(str(folder))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("val_loss")] == [
        (step, pytest.approx(value)) for step, value in found.items()
    ]
    pictures = board.Images("validation")
    assert [e.step for e in pictures] == [EVERY] and all(e.width > 192 and e.height > 192 for e in pictures)
    counted = "samples" if name == "structure_vae" else "tokens"
    for record in read_metrics(folder):
        assert record[f"{counted}_per_second"] == pytest.approx(record[counted] / record["seconds_per_step"])
        assert "mfu" not in record  # on a CPU


class Numbers(torch.utils.data.Dataset):
    """Batches that are their own numbers."""

    def __getitem__(self, step):
        return torch.tensor([float(step)])


def noisy(_network, batch, generator):
    """A loss that depends on the batch, and on random numbers of the generator and of torch."""
    noise = torch.randn(3, generator=generator).sum() + torch.randn(3).sum()
    return {"loss": batch.sum() + 1e-3 * noise, "other": batch.sum()}


def validated(tmp_path: Path, ranks=None, steps=(4,), **changes) -> list[dict]:
    tmp_path.mkdir(exist_ok=True)
    run = RunConfig(out_dir=str(tmp_path), device="cpu", tensorboard=False, steps=100, log_every=100, **changes)
    ranks = ranks or Ranks(torch.device("cpu"))
    validate = Validation(run, ranks, torch.nn.Identity, lambda: (Numbers(), 5), noisy, lambda *_: [], ())
    with Log(run, 0, ranks) as log:
        for step in range(1, max(steps) + 1):
            if step in steps:
                validate(step, log)
            log(step, {"loss": 1.0})
    return read_metrics(tmp_path) if ranks.is_first else []


def test_two_steps_draw_the_same_numbers_and_leave_those_of_training(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = validated(tmp_path, steps=(2, 4), validate_every=2)
    assert torch.equal(state, torch.get_rng_state())
    assert first["step"] == 2 and second["step"] == 4
    assert first["val_loss"] == second["val_loss"] != first["val_other"] == 2.0
    (other,) = validated(tmp_path / "seed", validate_every=4, seed=1)
    assert other["val_loss"] != first["val_loss"]
    (few,) = validated(tmp_path / "few", validate_every=4, validate_batches=2)
    assert few["val_other"] == 0.5


class OneOfTwo:
    """A rank beside another one, whose finds are given."""

    device, size = torch.device("cpu"), 2

    def __init__(self, rank: int, others):
        self.rank, self.is_first, self.others, self.found = rank, rank == 0, others, None

    def all(self, value):
        self.found = value
        return [value, self.others]


class Notes:
    """A log that keeps what is noted."""

    def note(self, values, seconds):
        self.values = values


def test_ranks_share_the_batches_and_get_the_same_loss():
    run, notes = RunConfig(device="cpu", validate_every=1, validate_pictures=0), Notes()

    def validate(ranks) -> dict:
        Validation(run, ranks, torch.nn.Identity, lambda: (Numbers(), 5), noisy, lambda *_: [], ())(1, notes)
        return notes.values

    second = OneOfTwo(1, [])
    validate(second)
    assert [number for number, _ in second.found] == [1, 3]
    assert validate(OneOfTwo(0, second.found)) == validate(Ranks(torch.device("cpu")))
    assert validate(OneOfTwo(0, "the disk is gone")) == {}


def test_a_split_that_cannot_be_read_is_named_and_training_goes_on(tmp_path, tmp_path_factory, capsys):
    chain = Chain(prepared(tmp_path_factory), tmp_path)
    run = dataclasses.replace(chain.vae.run, steps=4, validate_every=1, validate_split="none")
    train_vae.train(dataclasses.replace(chain.vae, run=run))
    errors = capsys.readouterr().out + capsys.readouterr().err
    assert errors.count("no validation on split 'none': expected shapes of split 'none'") == 1
    assert len(read_metrics(run.out_dir)) == 4 and not any("val_loss" in r for r in read_metrics(run.out_dir))


def test_speeds():
    found = speeds({"tokens": 1000.0, "loss": 1.0}, 0.5, weights=300_000_000, peak=989e12, ranks=2)
    assert found["tokens_per_second"] == 2000.0
    assert found["mfu"] == pytest.approx(6 * 3e8 * 2000 / (2 * 989e12))
    assert speeds({"samples": 8.0}, 2.0, 10, None) == {"samples_per_second": 4.0}
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_weights_that_multiply_every_token():
    config = LatentDiTConfig(hidden_size=64, depth=1, num_heads=32, num_kv_heads=2, pooled_conv=False)
    attention = 2 * 64 * 64 + 2 * 64 * 4 + 2 * 4 * 4 + 3 * 64  # q and out, k and v, their compression, gates
    expected = attention + 2 * 64 * 64 + 2 * 4 * 64 * 64 + 2 * 16 * 64  # q and out of the image, MLP, in and out
    assert token_weights(LatentDiT(config)) == expected


def test_every_shape_is_shown_once():
    assert [batches_of(number, 4) for number in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_validation_settings_are_checked(tmp_path):
    for changes, message in (
        ({"validate_every": -1}, "validate_every >= 0"),
        ({"validate_batches": 0}, "batches >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig(**changes)
    assert json.loads(json.dumps(dataclasses.asdict(RunConfig())))["validate_every"] == 1000
