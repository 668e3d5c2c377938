"""The shared parts of training runs: schedule, EMA, checkpoints, metrics, stopping."""

import copy
import itertools
import json
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training import checkpoints
from training.run import Log, RunConfig, Stop, is_save_step, learning_rate, read_metrics, seed_step
from training.run_folder import newest_checkpoint
from training.state import State


def make_config(tmp_path, **changes) -> RunConfig:
    return RunConfig(**({"out_dir": str(tmp_path), "device": "cpu", "tensorboard": False, "log_every": 2} | changes))


def make_pair() -> nn.Module:
    """Two layers, of which only the first is used."""
    torch.manual_seed(1)
    pair = nn.Linear(3, 2)
    pair.unused = nn.Linear(2, 2)
    return pair


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def advance(state: State, last_step: int) -> None:
    """Train a linear layer up to a step."""
    generator = torch.Generator()
    while state.step < last_step:
        seed_step(generator, 0, state.step)
        state.model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        state.update()


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = RunConfig(steps=101, learning_rate=2.0, final_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3)
    assert rates[50] == pytest.approx(2.0 * 0.55) and rates[100] == pytest.approx(0.2)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    constant = RunConfig(steps=100, learning_rate=2.0, warmup_steps=1)
    assert {learning_rate(step, constant) for step in range(100)} == {2.0}


def test_gradients_are_clipped(tmp_path):
    model = nn.Linear(3, 1, bias=False)
    config = make_config(tmp_path, grad_clip=0.5)
    state = State(model, config)
    state.optimizer, state.step = torch.optim.SGD(model.parameters(), lr=1.0), config.warmup_steps
    before = model.weight.detach().clone()
    (model.weight.sum() * 100).backward()
    norm = state.update()
    assert norm.item() == pytest.approx(100 * 3**0.5)
    moved = (model.weight - before).norm() / learning_rate(config.warmup_steps, config)
    assert moved.item() == pytest.approx(0.5, rel=1e-3) and model.weight.grad is None


def test_parameters_of_another_rate_move_less(tmp_path):
    model = nn.ModuleDict({"fast": nn.Linear(1, 1), "slow": nn.Linear(1, 1)})
    config = make_config(tmp_path, learning_rate=0.01, warmup_steps=1)
    state = State(model, config, rate_of=lambda name: 0.25 if name.startswith("slow") else 1.0)
    assert state.rates == [1.0, 0.25]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sum(parameter.sum() for parameter in model.parameters()).backward()
    state.update()  # the first step of Adam moves every parameter by its learning rate
    moved = {name: (before[name] - parameter).item() for name, parameter in model.named_parameters()}
    rate = learning_rate(0, state.config)
    assert moved["fast.weight"] == pytest.approx(rate, rel=1e-3)
    assert moved["slow.bias"] == pytest.approx(0.25 * rate, rel=1e-3)


def test_ema_warms_up_then_follows_slowly(tmp_path):
    model = nn.BatchNorm1d(2)
    state = State(model, make_config(tmp_path, ema_decay=0.75))
    assert not any(p.requires_grad for p in state.ema.parameters())
    with torch.no_grad():
        model.weight.fill_(11.0)
        model.running_mean.fill_(3.0)
    state.update()  # decay 1/10; without gradients, the weights stay
    assert state.step == 1 and model.weight.tolist() == [11.0, 11.0]
    assert state.ema.weight.tolist() == pytest.approx([10.0, 10.0]) and state.ema.running_mean.tolist() == [3.0, 3.0]
    state.step = 10_000
    state.update()
    assert state.ema.weight.tolist() == pytest.approx([10.25, 10.25])


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    def make():
        torch.manual_seed(1)
        return State(nn.Linear(3, 2), make_config(tmp_path))

    whole, first, second = make(), make(), make()
    advance(whole, 9)
    first.load()
    assert first.step == 0
    advance(first, 5)
    with first:
        first.save()
    second.load()
    assert second.step == 5
    advance(second, 9)
    for a, b in ((whole.model, second.model), (whole.ema, second.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_only_two_checkpoints_stay_and_another_network_is_refused(tmp_path):
    state = State(nn.Linear(3, 2), make_config(tmp_path))
    for step in (1, 2, 30):
        state.step = step
        state.save()
    state.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000030"]
    state.step = 0
    state.load()
    assert state.step == 30
    with pytest.raises(
        ValueError,
        match=r"step_00000030 belongs to another network.*ema.weight has the shape \(2, 4\) here, \(2, 3\)",
    ):
        State(nn.Linear(4, 2), make_config(tmp_path)).load()


def test_checkpoint_of_an_earlier_version_resumes(tmp_path):
    """It is one file, in which the optimiser's moments have numbers. Weights that never got a gradient have none."""
    whole = State(make_pair(), make_config(tmp_path))
    advance(whole, 3)
    parts = {"model": whole.model, "ema": whole.ema, "optimizer": whole.optimizer}
    values = {"step": 3} | {name: part.state_dict() for name, part in parts.items()}
    torch.save(values, tmp_path / "step_00000003.pt")
    advance(whole, 9)
    resumed = State(make_pair(), make_config(tmp_path))
    resumed.load()
    assert resumed.step == 3
    advance(resumed, 5)
    with resumed:
        resumed.save()
    again = State(make_pair(), make_config(tmp_path))
    again.load()
    assert again.step == 5 and len(again.optimizer.state) == 2
    advance(again, 9)
    assert equal(whole.model, again.model) and equal(whole.ema, again.ema)


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The state is written as it was when it was saved. The next save and the end wait."""
    state, hold = State(nn.Linear(3, 2), make_config(tmp_path)), threading.Event()
    real = checkpoints._publish
    monkeypatch.setattr(checkpoints, "_publish", lambda *arguments: hold.wait(60) and real(*arguments))
    advance(state, 2)
    before = copy.deepcopy(state)
    with state:
        state.save()
        advance(state, 4)
        assert newest_checkpoint(tmp_path) is None and not torch.equal(before.model.weight, state.model.weight)
        threading.Timer(0.2, hold.set).start()
        state.save()  # waits for the first
        assert newest_checkpoint(tmp_path).name == "step_00000002"
    assert newest_checkpoint(tmp_path).name == "step_00000004"
    shutil.rmtree(tmp_path / "step_00000004")
    state.load()
    assert state.step == 2 and equal(state.model, before.model) and equal(state.ema, before.ema)
    moments, expected = (s.optimizer.state[s.model.weight] for s in (state, before))
    assert all(torch.equal(moments[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_seed_of_a_step_sets_all_random_numbers():
    generator = torch.Generator()
    draws = []
    for seed, step in ((0, 3), (0, 4), (1, 3), (0, 3)):
        seed_step(generator, seed, step)
        draws.append((torch.rand(2, generator=generator).tolist(), torch.rand(2).tolist()))
    assert draws[0] == draws[3] and draws[0][0] != draws[1][0] != draws[2][0] != draws[0][0]
    assert draws[0][1] != draws[1][1]


def test_metrics_are_means_and_lines_after_the_checkpoint_are_dropped(tmp_path):
    config = make_config(tmp_path, steps=7)
    with Log(config, 0) as log:
        for step in range(1, 7):
            log(step, {"loss": torch.tensor(float(step)), "tokens": 10})
    assert [(r["step"], r["loss"], r["tokens"]) for r in read_metrics(tmp_path)] == [
        (2, 1.5, 10),
        (4, 3.5, 10),
        (6, 5.5, 10),
    ]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    with Log(config, 4) as log:
        log(5, {"loss": torch.tensor(8.0)})
        log(6, {"loss": torch.tensor(9.0)})
        log(7, {"loss": torch.tensor(2.0)})  # the last step is always written
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(2, 1.5), (4, 3.5), (6, 8.5), (7, 2.0)]


def test_metrics_reach_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Log(make_config(tmp_path, steps=4, tensorboard=True), 0) as log:
        for step in range(1, 5):
            log(step, {"loss": 1.0 / step})
    board = events.EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, round(e.value, 4)) for e in board.Scalars("loss")] == [(2, 0.75), (4, 0.2917)]


def test_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan near step 2"), Log(make_config(tmp_path), 0) as log:
        log(1, {"loss": torch.tensor(float("nan"))})
        log(2, {"loss": torch.tensor(1.0)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 2


def test_stop_after_a_signal(tmp_path):
    config = make_config(tmp_path, steps=100, save_every=10)
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop and not is_save_step(3, stop, config) and is_save_step(20, stop, config)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and is_save_step(3, stop, config)
    assert signal.getsignal(signal.SIGTERM) is before
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_after_max_minutes(monkeypatch):
    now = 100.0
    monkeypatch.setattr("training.run.time", SimpleNamespace(monotonic=lambda: now))
    stop, endless = Stop(max_minutes=2), Stop()
    now = 219.9
    assert not stop
    now = 220.0
    assert stop and not endless
