"""What every training run needs beside its loop: optimiser, schedule, EMA, checkpoints, metrics, a clean stop.

A run folder holds config.json, metrics.jsonl (one line per `log_every` steps), TensorBoard events and the two newest
checkpoints. All random numbers of a step come from (seed, step), so a checkpoint is weights, EMA, optimiser and step,
and a resumed run is the uninterrupted one: bit for bit on a CPU.
"""

import copy
import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from d3ds2.networks.model_files import load_network

KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class RunConfig:
    """Settings of the loop; each script adds its data, network and loss."""

    out_dir: str = "runs/run"
    seed: int = 0
    steps: int = 1000
    learning_rate: float = 1e-4  # [A]
    final_learning_rate: float = 1.0  # fraction at the last step, reached by a cosine; 1: constant [D]
    warmup_steps: int = 100  # [D]
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW [D]
    weight_decay: float = 0.0  # [D]
    grad_clip: float = 1.0  # norm [D]
    ema_decay: float = 0.9999  # [D]; at step n at most (1 + n) / (10 + n)
    precision: Literal["bf16", "fp32"] = "bf16"  # autocast on CUDA; a CPU always computes in fp32
    compile: bool = False  # the dense transformer blocks by torch.compile: faster steps after some seconds
    device: str = "auto"
    workers: int = 0  # processes that load data
    log_every: int = 20
    save_every: int = 1000
    start_from: str = ""  # model folder whose weights a new run begins with, for a further stretch of training
    max_minutes: float = 0.0  # stop, save and export after this time; 0: no limit
    tensorboard: bool = True

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected run.{name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"expected run.ema_decay in [0, 1), got {self.ema_decay}")


def start(config: RunConfig, whole_config) -> torch.device:
    """Make the run folder, seed the initialisation, and return the device. `whole_config` is what config.json keeps.

    Raises as `check_run`.
    """
    out_dir = Path(config.out_dir)
    check_run(out_dir, whole_config.model_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(asdict(whole_config), indent=2))
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    return find_device(config.device)


def check_run(out_dir: str | Path, model_dir: str | Path) -> None:
    """A run goes on for the model that it began with.

    Raises:
        ValueError: the run folder has a checkpoint that was made for another model folder.
    """
    if newest_checkpoint(out_dir) is None:
        return
    owner = json.loads((Path(out_dir) / "config.json").read_text())["model_dir"]
    if Path(owner).resolve() != Path(model_dir).resolve():
        raise ValueError(f"{out_dir} is a run of the model {owner}, not of {model_dir}: give another run.out_dir")


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(config: RunConfig, device: torch.device):
    enabled = config.precision == "bf16" and device.type == "cuda"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def seed_step(generator: torch.Generator, seed: int, step: int) -> None:
    """Make all random numbers of a step a function of (seed, step), those of the generator and torch's global ones."""
    key = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    generator.manual_seed(key)
    torch.manual_seed(key)


def compile_blocks(config: RunConfig, *stacks: nn.ModuleList) -> None:
    """Compile the blocks of stacks in place if `config.compile`; equal blocks share their code."""
    if config.compile:
        for stack in stacks:
            for block in stack:
                block.compile()


# --- optimiser and EMA


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda,
    )


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then a cosine from 1 to `final_learning_rate` at the last step."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = min(1.0, step / max(config.steps - 1, 1))
    final = config.final_learning_rate
    return config.learning_rate * warmup * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_step(optimizer: torch.optim.Optimizer, step: int, config: RunConfig) -> Tensor:
    """Clip the gradients, step and clear them; returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def make_ema(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for theirs, ours in zip(ema.buffers(), model.buffers(), strict=True):
        theirs.copy_(ours)


# --- checkpoints


def save_checkpoint(
    out_dir: str | Path, step: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write step_<n>.pt, whole or not at all, and delete all but the two newest."""
    state = {"step": step, "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
    path = Path(out_dir) / f"step_{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    for old in sorted(Path(out_dir).glob("step_*.pt"))[:-KEEP_CHECKPOINTS]:
        old.unlink()


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    return max(Path(out_dir).glob("step_*.pt"), default=None)


def last_step(out_dir: str | Path) -> int:
    """Steps that a run has behind it, 0 where it has no checkpoint."""
    newest = newest_checkpoint(out_dir)
    return 0 if newest is None else int(newest.stem.removeprefix("step_"))


def load_checkpoint(out_dir: str | Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint of a run, if it has one; returns the step at which the run goes on.

    Raises:
        ValueError: the checkpoint belongs to a network of other sizes.
    """
    newest = newest_checkpoint(out_dir)
    if newest is None:
        return 0
    device = next(model.parameters()).device
    state = torch.load(newest, weights_only=True, map_location=device)
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{newest} is not of this network; use another run.out_dir: {error}") from error
    return state["step"]


def load_start(config: RunConfig, **networks: nn.Module) -> None:
    """Give networks, by their names in a model folder, the weights of `config.start_from`; nothing if it is empty.

    To be called before `make_ema`; a run that has a checkpoint goes on from that.

    Raises:
        ValueError: the folder's network has other sizes.
    """
    if not config.start_from:
        return
    for name, network in networks.items():
        weights = load_network(config.start_from, name).state_dict()
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{name} of {config.start_from} is not of this network's sizes: {error}") from error


# --- metrics


class Log:
    """Means of the metrics over every `log_every` steps: metrics.jsonl, TensorBoard and a progress bar.

    Metrics stay on the device until they are written. Lines beyond `first_step`, of a run that was killed after its
    last checkpoint, are dropped.
    """

    def __init__(self, config: RunConfig, first_step: int):
        self.config, self.out_dir = config, Path(config.out_dir)
        self._sums, self._count, self._since = {}, 0, time.perf_counter()
        path = self.out_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept))
        self._file = open(path, "a")  # noqa: SIM115, closed in __exit__
        self._board = _tensorboard(self.out_dir, first_step) if config.tensorboard else None
        self._progress = tqdm(initial=first_step, total=config.steps, unit="step", desc=self.out_dir.name)

    def __call__(self, step: int, metrics: dict[str, Tensor | float]) -> None:
        """Count one finished step.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self._progress.update()
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._write(step)

    def _write(self, step: int) -> None:
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        seconds = time.perf_counter() - self._since
        record = {"step": step, **means, "learning_rate": learning_rate(step - 1, self.config)}
        record["seconds_per_step"] = seconds / self._count
        self._sums, self._count, self._since = {}, 0, time.perf_counter()
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if self._board is not None and name != "step":
                self._board.add_scalar(name, value, step)
        self._progress.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} near step {step}; lower run.learning_rate and start again: the run "
                f"resumes from its newest checkpoint in {self.out_dir}"
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._progress.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(out_dir: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional: its import is slow and it may not be installed
    except ImportError:
        tqdm.write("TensorBoard is not installed (pip install tensorboard): metrics go to metrics.jsonl alone")
        return None
    return SummaryWriter(str(out_dir), purge_step=first_step + 1)


def read_metrics(out_dir: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


# --- stopping


class Stop:
    """True once the run should save and end: after SIGTERM or Ctrl-C, or when `max_minutes` have passed.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self, max_minutes: float = 0.0):
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self._signalled, self._handlers = False, {}

    def __bool__(self) -> bool:
        return self._signalled or time.monotonic() >= self._deadline

    def _handle(self, number, _frame) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def is_save_step(step: int, stop: Stop, config: RunConfig) -> bool:
    """Whether to write a checkpoint: every `save_every` steps, at the end, and before a stop."""
    return step % config.save_every == 0 or step == config.steps or bool(stop)
