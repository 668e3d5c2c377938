"""All that a training run changes from step to step, and its checkpoints.

A checkpoint `step_<n>.pt` holds the weights, their moving average (EMA), the optimiser and the step. It needs no random
state: all random numbers of a step come from (seed, step). All ranks hold the same state, so the first one writes a
single file, which any number of ranks load; torch.distributed.checkpoint would be needed for sharded states alone.
"""

import copy
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from tqdm import tqdm

from d3ds2.kernels.devices import on_cuda
from d3ds2.networks.model_files import load_network
from d3ds2.storage.atomic_file import replacing
from training.distributed import Ranks
from training.run import ALONE, RunConfig, learning_rate
from training.run_folder import checkpoints

KEEP_CHECKPOINTS = 2


class State:
    """A model in training, at step 0 until `load` finds a checkpoint.

    Args:
        rate_of: the factor of a parameter's learning rate, by the parameter's name; default: 1 for all.

    Attributes:
        model: the network that is trained, on its device.
        ema: its moving average, which is exported.
        optimizer: AdamW over the parameters that require gradients, in a group for each of `rates`.
        step: number of updates so far.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        ranks: Ranks = ALONE,
        rate_of: Callable[[str], float] = lambda name: 1.0,
    ):
        self.config, self.model, self.ranks = config, model, ranks
        ranks.copy_from_first(_tensors(model))
        self.ema = copy.deepcopy(model).requires_grad_(False)
        by_rate = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                by_rate.setdefault(rate_of(name), []).append(parameter)
        self.rates, groups = list(by_rate), list(by_rate.values())
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=on_cuda(groups[0][0]),
        )
        self.step = 0

    def update(self) -> Tensor:
        """Finish a step, given the gradients of this rank's parts.

        Sum them over the ranks and clip them, move the weights and the average, and clear the gradients.

        Returns:
            The norm of the gradients before clipping, a scalar.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate(self.step, self.config) * rate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ranks.sum_gradients(parameters)
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema()
        self.step += 1
        return grad_norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        for average, current in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            average.copy_(current)

    def save(self) -> None:
        """Write step_<n>.pt to the run folder, whole or not at all, and delete all but the two newest.

        Raises:
            FloatingPointError: a value is not finite; nothing is written.
            OSError: the file cannot be written.
        """
        out_dir = Path(self.config.out_dir)
        values = {"step": self.step} | {name: part.state_dict() for name, part in self._parts.items()}
        if not is_finite(values):
            raise FloatingPointError(
                f"the weights are not finite at step {self.step}, so no checkpoint is written; lower run.learning_rate "
                f"and start again: the run resumes from its newest checkpoint in {out_dir}"
            )
        if not self.ranks.is_first:
            return
        path = out_dir / f"step_{self.step:08d}.pt"
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                torch.save(values, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError where the disk is full
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise OSError(f"cannot write {path}: {cause}") from error
        for old in sorted(out_dir.glob("step_*.pt"))[:-KEEP_CHECKPOINTS]:
            old.unlink()

    @property
    def _parts(self) -> dict:
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}

    def load(self) -> None:
        """Continue from the newest checkpoint in the run folder; without one, nothing changes.

        A damaged checkpoint is named, and the one before is taken.

        Raises:
            ValueError: the checkpoint belongs to a network of other sizes, or all checkpoints are damaged.
        """
        device, values = next(self.model.parameters()).device, None
        path = self.ranks.from_first(find_intact(self.config.out_dir) if self.ranks.is_first else None)
        if path is None:
            return
        values = torch.load(path, weights_only=True, map_location=device)
        try:
            for name, part in self._parts.items():
                part.load_state_dict(values[name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} belongs to another network; choose another run.out_dir: {error}") from error
        self.step = values["step"]


def find_intact(out_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that is whole and finite, and name those that are not; None if there is none at all.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged = []
    for path in checkpoints(out_dir):
        if fault := fault_of(path):
            damaged.append(f"{path} ({fault})")
            continue
        if damaged:
            tqdm.write(f"damaged checkpoint {', '.join(damaged)}: the run goes on from {path.name}")
        return path
    if damaged:
        raise ValueError(f"damaged checkpoint {', '.join(damaged)}; delete it to start from step 0")
    return None


def fault_of(path: Path) -> str:
    """Say what is wrong with a checkpoint file; "" if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "wrong checksum"
        values = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if missing := {"step", "model", "ema", "optimizer"} - values.keys():
            return f"no {', '.join(sorted(missing))}"
        return "" if is_finite(values) else "values that are not finite"
    except (OSError, EOFError, RuntimeError, ValueError, AttributeError, UnpicklingError, zipfile.BadZipFile) as error:
        return str(error).partition("\n")[0] or type(error).__name__


def is_finite(values) -> bool:
    """Whether all floating tensors in nested dicts and lists are finite. Waits for the device once."""
    finite = [tensor.isfinite().all() for tensor in _tensors_in(values) if tensor.is_floating_point()]
    return all(torch.stack(on_device).all().item() for on_device in _by_device(finite))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _tensors_in(values):
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors_in(value)


def _by_device(flags: list[Tensor]) -> list[list[Tensor]]:
    devices = {flag.device for flag in flags}  # AdamW keeps its steps on the CPU unless it is fused
    return [[flag for flag in flags if flag.device == device] for device in devices]


def load_start(config: RunConfig, **networks: nn.Module) -> None:
    """Copy the weights of the model folder `config.start_from` into networks, named as in that folder.

    Does nothing where `start_from` is empty. Call it before `State` copies the model; a checkpoint of the run, if there
    is one, then overrides these weights.

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
            raise ValueError(f"{name} in {config.start_from} has other sizes than this network: {error}") from error
