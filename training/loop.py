"""The steps of a training run, which are the same for all networks: gradients, update, validation, log, checkpoints."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from d3ds2.kernels.devices import make_generator
from training.data.parts import Part
from training.run import Log, Stop, is_save_step, seed_step
from training.state import State

Losses = Callable[[Part, torch.Generator], dict[str, Any]]


def run_steps(
    state: State,
    batches: Iterable[list[Part]],
    losses: Losses,
    validate: Callable[[int, Log], None],
    export: Callable[[nn.Module], None],
    token_weights: int = 0,
) -> nn.Module:
    """Train up to the last step, or until the run is stopped.

    Args:
        batches: the parts of this rank, for each step from `state.step` on; see `load_parts`.
        losses: returns the metrics of a part. "loss" is a scalar, whose gradients train the model. All random numbers
            must come from the generator, which follows from the seed and the step.
        validate: called with the number of steps so far and the log, after each step.
        export: called with the averaged model when a checkpoint is written, by the first rank alone.
        token_weights: see `Log`.

    Returns:
        The averaged (EMA) model.
    """
    run, ranks = state.config, state.ranks
    generator = make_generator(ranks.device)
    with Stop(run.max_minutes, ranks) as stop, Log(run, state.step, ranks, token_weights) as log, state:
        for parts in batches:
            for part in parts:
                seed_step(generator, run.seed, state.step)
                metrics = losses(part, generator)
                metrics["loss"].backward()
                log.add(metrics)
            grad_norm = state.update()

            validate(state.step, log)
            log(state.step, {"grad_norm": grad_norm})
            if is_save_step(state.step, stop, run):
                state.save()
                averaged = state.averaged()
                if ranks.is_first:
                    export(averaged)
                if stop:
                    break
    return state.averaged()
