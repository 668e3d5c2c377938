"""The surroundings of a training loop: settings, run folder, random seeds, schedule, metrics, a clean stop.

The run folder (`training.run_folder`) is locked while a run writes to it. All random numbers of a step come from
(seed, step), so a resumed run equals an uninterrupted one, bit for bit on a CPU.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from d3ds2.kernels.devices import trains_in_bf16
from d3ds2.storage.atomic_file import replacing
from training.boards import open_boards
from training.distributed import Ranks, ranks_on
from training.folder_lock import locked
from training.run_folder import check_run, clear_leftovers, exporting, write_settings
from training.speed import peak_flops, speeds

ALONE = Ranks(torch.device("cpu"))  # where only the number of ranks counts


@dataclass(frozen=True)
class RunConfig:
    """Settings of the loop. Each script adds those of its data, network and loss."""

    out_dir: str = "runs/run"
    seed: int = 0
    steps: int = 1000
    sharded: bool = False  # several ranks share the weights (FSDP2) instead of copying them: less memory, more traffic
    accumulate: int = 1  # parts of a batch that a rank computes one after the other: less memory, the same step
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
    wandb: str = ""  # project of Weights & Biases; "": none
    validate_every: int = 1000  # steps from one validation to the next, see validation.py; 0: none
    validate_split: str = "val"
    validate_batches: int = 8  # of which the loss is the mean
    validate_pictures: int = 4  # shapes shown at each validation

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "save_every", "validate_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected run.{name} >= 1, got {getattr(self, name)}")
        for name in ("validate_every", "validate_pictures"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected run.{name} >= 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"expected run.ema_decay in [0, 1), got {self.ema_decay}")


@contextmanager
def start(config: RunConfig, whole_config) -> Generator[Ranks]:
    """Lock the run folder, seed the initialisation, and yield the ranks with their devices.

    The first rank deletes leftovers of killed runs and writes `whole_config` to config.json.

    Raises:
        ValueError: the run folder belongs to another model, see `check_run`.
        FolderInUseError: another process writes to it.
    """
    ranks = ranks_on(config.device)
    out_dir, model_dir = Path(config.out_dir), Path(whole_config.model_dir)
    with ExitStack() as held:
        if ranks.is_first:
            out_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out_dir))
            check_run(out_dir, model_dir)
            clear_leftovers(out_dir)
            if model_dir.is_dir():
                with exporting(model_dir):
                    pass
            write_settings(out_dir, asdict(whole_config))
        ranks.wait()
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
        yield ranks


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


# --- metrics


class Log:
    """Writes the means of the metrics over `log_every` steps to metrics.jsonl, the boards and a progress bar.

    Metrics stay on the device until they are written. If a run was killed after its last checkpoint, metrics.jsonl has
    lines beyond `first_step`; these are dropped. Only the first rank writes. `token_weights` is that of
    `training.speed`, for MFU.
    """

    def __init__(self, config: RunConfig, first_step: int, ranks: Ranks = ALONE, token_weights: int = 0):
        self.config, self.out_dir, self.ranks = config, Path(config.out_dir), ranks
        self._sums, self._count, self._since, self._notes = {}, 0, time.perf_counter(), {}
        self._file, self._boards = None, []
        self._weights, self._peak = token_weights, peak_flops(ranks.device, config.precision)
        if ranks.is_first:
            path = self.out_dir / "metrics.jsonl"
            records = read_metrics(self.out_dir) if path.exists() else []
            kept = [json.dumps(r) + "\n" for r in records if r["step"] <= first_step]
            with replacing(path) as temporary:
                temporary.write_text("".join(kept))
            self._file = open(path, "a")  # noqa: SIM115, closed in __exit__
            self._boards = open_boards(self.out_dir, first_step, config.tensorboard, config.wandb)
        self._progress = tqdm(
            initial=first_step, total=config.steps, unit="step", desc=self.out_dir.name, disable=not ranks.is_first
        )

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add metrics of a part of a step, each a scalar: those of all parts on all ranks are summed."""
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def note(self, values: dict[str, float], seconds: float = 0.0) -> None:
        """Add values, the same on all ranks, to the record of the step that ends next, which is then written.

        The seconds that it took to find them do not count as time of training.
        """
        self._notes |= values
        self._since += seconds

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) uint8 on the boards."""
        for board in self._boards:
            board.picture(name, picture, step)

    def __call__(self, step: int, metrics: dict[str, Tensor | float]) -> None:
        """Finish a step, given metrics that are the same on all ranks; "loss" must be among all of its metrics.

        Raises:
            FloatingPointError: the mean loss is not finite when it is written.
        """
        if self.ranks.is_first:
            self.add(metrics)
        self._count += 1
        self._progress.update()
        if step % self.config.log_every == 0 or step == self.config.steps or self._notes:
            self._write(step)

    def _write(self, step: int) -> None:
        means = {name: value / self._count for name, value in self._totals().items()}
        seconds = time.perf_counter() - self._since
        record = {"step": step, **means, "learning_rate": learning_rate(step - 1, self.config)}
        record["seconds_per_step"] = seconds / self._count
        record |= speeds(means, record["seconds_per_step"], self._weights, self._peak, self.ranks.size) | self._notes
        self._sums, self._count, self._since, self._notes = {}, 0, time.perf_counter(), {}
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for board in self._boards:
            board.scalars({name: value for name, value in record.items() if name != "step"}, step)
        self._progress.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} near step {step}; lower run.learning_rate and start again: the run "
                f"resumes from its newest checkpoint in {self.out_dir}"
            )

    def _totals(self) -> dict[str, float]:
        """The sums over the ranks. A rank whose parts were all empty has no metrics."""
        own = {name: float(value) for name, value in self._sums.items()}
        if self.ranks.size == 1:
            return own
        every = self.ranks.all(own)
        names = dict.fromkeys(name for sums in every for name in sums)
        return {name: sum(sums.get(name, 0.0) for sums in every) for name in names}

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
        self._progress.close()
        for board in self._boards:
            board.close()


def read_metrics(out_dir: str | Path) -> list[dict]:
    """Read the records of a run's metrics.jsonl. A damaged line is named and left out."""
    path, records = Path(out_dir) / "metrics.jsonl", []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):  # else the run was killed while it wrote the line
                tqdm.write(f"{path}: line {number} is damaged and is left out")
    return records


# --- stopping


class Stop:
    """True once the run should save and end: after SIGTERM or Ctrl-C, or after `max_minutes`; 0 sets no limit.

    Several ranks stop together, at the next `agree` after one of them should. A second Ctrl-C ends the process at once.
    """

    def __init__(self, max_minutes: float = 0.0, ranks: Ranks = ALONE):
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self._signalled, self._handlers = False, {}
        self._ranks, self._agreed = ranks, False

    def __bool__(self) -> bool:
        return self._agreed if self._ranks.size > 1 else self._wanted()

    def agree(self) -> None:
        """Ask the other ranks, once a step; all must call it."""
        if self._ranks.size > 1:
            self._agreed = self._ranks.any(self._wanted())

    def _wanted(self) -> bool:
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
    """Whether to write a checkpoint after this step: every `save_every` steps, at the end, and before a stop.

    All ranks call it after each step, and get the same answer.
    """
    stop.agree()
    return step % config.save_every == 0 or step == config.steps or bool(stop)
