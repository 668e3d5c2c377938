"""All that a training run changes from step to step, and its checkpoints.

A checkpoint `step_<n>.pt` holds the weights, their moving average (EMA), the optimiser and the step. It needs no random
state: all random numbers of a step come from (seed, step).
"""

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from d3ds2.kernels.devices import on_cuda
from d3ds2.networks.model_files import load_network
from training.run import RunConfig, learning_rate, newest_checkpoint

KEEP_CHECKPOINTS = 2


class State:
    """A model in training, at step 0 until `load` finds a checkpoint.

    Attributes:
        model: the network that is trained, on its device.
        ema: its moving average, which is exported.
        optimizer: AdamW over the parameters that require gradients.
        step: number of updates so far.
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        self.config, self.model = config, model
        self.ema = copy.deepcopy(model).requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=on_cuda(parameters[0]),
        )
        self.step = 0

    def update(self) -> Tensor:
        """Finish a step, given its gradients: clip them, move the weights and the average, clear the gradients.

        Returns:
            The norm of the gradients before clipping, a scalar.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
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
        """Write step_<n>.pt to the run folder, whole or not at all, and delete all but the two newest."""
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        values = {"step": self.step} | {name: part.state_dict() for name, part in parts.items()}
        out_dir = Path(self.config.out_dir)
        path = out_dir / f"step_{self.step:08d}.pt"
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        for old in sorted(out_dir.glob("step_*.pt"))[:-KEEP_CHECKPOINTS]:
            old.unlink()

    def load(self) -> None:
        """Continue from the newest checkpoint in the run folder; without one, nothing changes.

        Raises:
            ValueError: the checkpoint belongs to a network of other sizes.
        """
        newest = newest_checkpoint(self.config.out_dir)
        if newest is None:
            return
        device = next(self.model.parameters()).device
        values = torch.load(newest, weights_only=True, map_location=device)
        try:
            self.model.load_state_dict(values["model"])
            self.ema.load_state_dict(values["ema"])
            self.optimizer.load_state_dict(values["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{newest} belongs to another network; choose another run.out_dir: {error}") from error
        self.step = values["step"]


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
