"""All that a training run changes from step to step, and its checkpoints.

A checkpoint (`training.checkpoints`) holds the weights, their moving average (EMA), the optimiser and the step. It
needs no random state: all random numbers of a step come from (seed, step).
"""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor, nn

from d3ds2.kernels.devices import on_cuda
from d3ds2.networks.model_files import load_network
from training.checkpoints import PARTS, find_intact, is_finite, open_checkpoint, read_into, save_in_background
from training.distributed import LostRankError, Ranks, own_part
from training.run import ALONE, RunConfig, learning_rate
from training.sharding import copy_to_shard, copy_whole, shard, whole


class State:
    """A model in training, at step 0 until `load` finds a checkpoint.

        with state:  # its end waits for the checkpoint that is being written
            ...

    Args:
        rate_of: the factor of a parameter's learning rate, by the parameter's name; default: 1 for all.

    Attributes:
        model: the network that is trained, on its device; sharded over the ranks if `run.sharded`.
        ema: its moving average, sharded likewise; `averaged` is what to export or evaluate.
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
        self._unsharded = None
        if config.sharded and ranks.is_joined:
            self._unsharded = copy.deepcopy(self.ema).cpu()
            for part in (self.model, self.ema):
                shard(part, ranks)
        groups: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rate_of(name), {})[name] = parameter
        self.rates, self._trained = list(groups), [name for group in groups.values() for name in group]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group.values())} for group in groups.values()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=on_cuda(next(model.parameters())),
        )
        self.step = 0
        self._saving: Future | None = None

    def update(self) -> Tensor:
        """Finish a step, given the gradients of this rank's parts.

        Sum them over the ranks and clip them, move the weights and the average, and clear the gradients.

        Returns:
            The norm of the gradients before clipping, a scalar.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate(self.step, self.config) * rate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._unsharded is None:
            self.ranks.sum_gradients(parameters)
        grad_norm = self._clip(parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema()
        self.step += 1
        return grad_norm

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        for parameter in parameters:
            if not parameter.requires_grad:  # FSDP2 sums the gradients also of weights that were frozen on the way
                parameter.grad = None
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        return norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        average, current = ([own_part(p) for p in part.parameters()] for part in (self.ema, self.model))
        torch._foreach_lerp_(average, current, 1 - decay)
        for average, current in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            average.copy_(current)

    def averaged(self) -> nn.Module:
        """Return the moving average with whole weights, as exports need it: `ema`, or a copy of it if it is sharded.

        All ranks must call it.
        """
        if self._unsharded is None:
            return self.ema
        copy_whole(self.ema, self._unsharded)
        return copy.deepcopy(self._unsharded).to(self.ranks.device)

    # --- checkpoints

    def save(self) -> None:
        """Begin to write a checkpoint, after the one before is written; the run goes on meanwhile.

        Raises:
            FloatingPointError: a value is not finite; nothing is written.
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        tensors, out_dir = self._named_tensors(), Path(self.config.out_dir)
        if self.ranks.any(not is_finite(tensors)):
            raise FloatingPointError(
                f"the weights are not finite at step {self.step}, so no checkpoint is written; lower run.learning_rate "
                f"and start again: the run resumes from its newest checkpoint in {out_dir}"
            )
        self._saving = save_in_background(out_dir, self.step, tensors, self.ranks)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            OSError: it could not be written. Nothing of it is left.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def __enter__(self) -> "State":
        return self

    def __exit__(self, _kind, error, _trace) -> None:
        try:
            self.wait()
        except (OSError, LostRankError):
            if error is None:
                raise

    def _named_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, in place."""
        model, ema, optimizer = (f"{part}." for part in PARTS)
        named = {model + name: tensor for name, tensor in self.model.state_dict().items()}
        named |= {ema + name: tensor for name, tensor in self.ema.state_dict().items()}
        parameters = dict(self.model.named_parameters())
        for name in self._trained:
            moments = self.optimizer.state.get(parameters[name], {})
            named |= {f"{optimizer}{name}.{moment}": tensor for moment, tensor in moments.items()}
        return named

    def load(self) -> None:
        """Continue from the newest checkpoint in the run folder; without one, nothing changes.

        A damaged checkpoint is named, and the one before is taken.

        Raises:
            ValueError: the checkpoint belongs to a network of other sizes, or all checkpoints are damaged.
        """
        path = self.ranks.from_first(find_intact(self.config.out_dir) if self.ranks.is_first else None)
        if path is None:
            return
        try:
            stored = open_checkpoint(path, self._trained)
            tensors = self._make_moments(stored.shapes)
            for name in sorted(tensors.keys() | stored.shapes.keys()):
                here, there = tensors[name].shape if name in tensors else None, stored.shapes.get(name)
                if here != there:
                    raise ValueError(f"{name} has the shape {_text(here)} here, {_text(there)} there")
        except ValueError as error:
            raise ValueError(f"{path} belongs to another network; choose another run.out_dir: {error}") from error
        if stored.tensors is None:
            read_into(path, tensors)
        else:
            for name, values in stored.tensors.items():
                copy_to_shard(values, tensors[name])
        self.step = stored.step

    def _make_moments(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Give the optimiser the moments among these names of a checkpoint; return the tensors of a checkpoint."""
        self.optimizer.state.clear()
        parameters = {name: p for name, p in self.model.named_parameters() if name in self._trained}
        for name in names:
            part, _, moment_of = name.partition(".")
            weight, _, moment = moment_of.rpartition(".")
            if part == PARTS[-1] and weight in parameters:
                parameter = parameters[weight]
                is_count = moment == "step"
                device = parameter.device if self.optimizer.defaults["fused"] else torch.device("cpu")
                made = torch.zeros((), device=device) if is_count else torch.zeros_like(parameter, requires_grad=False)
                self.optimizer.state[parameter][moment] = made
        return self._named_tensors()


def _text(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


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
