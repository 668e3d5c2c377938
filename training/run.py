"""The surroundings of a training loop: settings, run folder, random seeds, schedule, metrics, a clean stop.

A run folder holds config.json, metrics.jsonl (one line per `log_every` steps), TensorBoard events and the two newest
checkpoints (`training.state`). All random numbers of a step come from (seed, step), so a resumed run equals an
uninterrupted one, bit for bit on a CPU.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import json
import math
import signal
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from d3ds2.kernels.devices import find_device, trains_in_bf16


@dataclass(frozen=True)
class RunConfig:
    """Settings of the loop. Each script adds those of its data, network and loss."""

    out_dir: str = "runs/run"
    seed: int = 0
    steps: int = 1000
    learning_rate: float = 1e-4  # [A]
    final_learning_rate: float = 1.0  # at the last step, as a fraction, along a cosine; 1: constant [D]
    warmup_steps: int = 100  # [D]
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW [D]
    weight_decay: float = 0.0  # [D]
    grad_clip: float = 1.0  # largest norm of the gradients [D]
    ema_decay: float = 0.9999  # at most (1 + n) / (10 + n) at step n [D]
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: autocast on a GPU; a CPU always computes in fp32
    compile: bool = False  # torch.compile the dense transformer blocks: a slower start, then faster steps
    device: str = "auto"
    workers: int = 0  # data loading processes; 0: load in the main process
    log_every: int = 20
    save_every: int = 1000
    start_from: str = ""  # model folder from whose weights a new run starts; "": random weights
    max_minutes: float = 0.0  # after which to save, export and stop; 0: no limit
    tensorboard: bool = True

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected run.{name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"expected run.ema_decay in [0, 1), got {self.ema_decay}")


def start(config: RunConfig, whole_config) -> torch.device:
    """Make the run folder, seed the initialisation, and return the device. `whole_config` goes to config.json.

    Raises:
        ValueError: the run folder belongs to another model, see `check_run`.
    """
    out_dir = Path(config.out_dir)
    check_run(out_dir, whole_config.model_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(asdict(whole_config), indent=2))
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    return find_device(config.device)


def check_run(out_dir: str | Path, model_dir: str | Path) -> None:
    """Check that a run folder belongs to a model folder: a run continues only with the model it began with.

    Raises:
        ValueError: the run folder has a checkpoint of another model folder.
    """
    if newest_checkpoint(out_dir) is None:
        return
    owner = json.loads((Path(out_dir) / "config.json").read_text())["model_dir"]
    if Path(owner).resolve() != Path(model_dir).resolve():
        raise ValueError(f"{out_dir} is a run of the model {owner}, not of {model_dir}: choose another run.out_dir")


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager:
    """The context in which a step's forward pass runs: bf16 where the device trains in it, unless set to fp32."""
    if config.precision == "bf16" and trains_in_bf16(device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def seed_step(generator: torch.Generator, seed: int, step: int) -> None:
    """Seed the generator and torch's global one, so that a step's random numbers depend on (seed, step) alone."""
    key = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    generator.manual_seed(key)
    torch.manual_seed(key)


def compile_blocks(config: RunConfig, *stacks: nn.ModuleList) -> None:
    """Compile the blocks of each stack in place if `config.compile`; equal blocks share their compiled code."""
    if config.compile:
        for stack in stacks:
            for block in stack:
                block.compile()


def learning_rate(step: int, config: RunConfig) -> float:
    """The rate of a step: linear warm-up times a cosine that falls to `final_learning_rate` at the last step."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = min(1.0, step / max(config.steps - 1, 1))
    final = config.final_learning_rate
    return config.learning_rate * warmup * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


# --- run folders


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run folder, or None."""
    return max(Path(out_dir).glob("step_*.pt"), default=None)


def last_step(out_dir: str | Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    newest = newest_checkpoint(out_dir)
    return 0 if newest is None else int(newest.stem.removeprefix("step_"))


# --- metrics


class Log:
    """Writes the means of the metrics over `log_every` steps to metrics.jsonl, TensorBoard and a progress bar.

    Metrics stay on the device until they are written. If a run was killed after its last checkpoint, metrics.jsonl has
    lines beyond `first_step`; these are dropped.
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
        """Add the metrics of a finished step, each a scalar; "loss" must be among them.

        Raises:
            FloatingPointError: the mean loss is not finite when it is written.
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
        from torch.utils.tensorboard import SummaryWriter  # imported here: it is slow, and may not be installed
    except ImportError:
        tqdm.write("TensorBoard is not installed (pip install tensorboard): metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(out_dir), purge_step=first_step + 1)


def read_metrics(out_dir: str | Path) -> list[dict]:
    """Read the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


# --- stopping


class Stop:
    """True once the run should save and end: after SIGTERM or Ctrl-C, or after `max_minutes`; 0 sets no limit.

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
    """Whether to write a checkpoint after this step: every `save_every` steps, at the end, and before a stop."""
    return step % config.save_every == 0 or step == config.steps or bool(stop)
