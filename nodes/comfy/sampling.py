"""Inputs of both sampling nodes beside seed, steps and guidance_scale: several views, the sampler, its times."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from comfy_api.latest import io

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ...d3ds2.rectified_flow import Sampler

NOISE = 0.99  # sigmas that begin here or above begin with noise alone: some schedulers stop short of 1


def more_sampling_inputs(views_tooltip: str) -> list[io.Input]:
    """Return the further inputs of every sampling node. All are optional: older workflows lack them."""
    return [
        io.Boolean.Input("views_of_one_object", default=False, optional=True, tooltip=views_tooltip),
        io.Combo.Input(
            "sampler",
            options=["euler", "heun"],
            default="euler",
            optional=True,
            tooltip="`heun` evaluates the model twice per step, which makes up for fewer steps.",
            advanced=True,
        ),
        io.Float.Input(
            "guidance_start",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Guidance acts from this share of noise on; 1 is the beginning of sampling. Steps without guidance "
            "take half the time.",
            advanced=True,
        ),
        io.Float.Input(
            "guidance_end",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Guidance acts down to this share of noise; 0 is the end of sampling.",
            advanced=True,
        ),
        io.Float.Input(
            "guidance_rescale",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Curbs what a strong guidance_scale exaggerates. 0 leaves the result as it is.",
            advanced=True,
        ),
        io.Custom("SIGMAS").Input(
            "sigmas",
            optional=True,
            tooltip="The times of the steps, falling from 1 to 0, from any of ComfyUI's schedulers for flow models. "
            "They replace steps and the model's own schedule.",
        ),
    ]


def make_sampler(
    sampler: str, guidance_start: float, guidance_end: float, guidance_rescale: float, sigmas: torch.Tensor | None
) -> Sampler:
    """Return the sampler that the inputs ask for; sigmas are (steps + 1,) or None.

    Raises ValueError, with advice, if the inputs cannot work.
    """
    from ...d3ds2.rectified_flow import Sampler

    if not guidance_end <= guidance_start:
        raise ValueError(
            f"guidance_start {guidance_start:g} lies below guidance_end {guidance_end:g}: noise falls from 1 to 0 "
            "while sampling, so guidance starts at the higher value."
        )
    times = None if sigmas is None else times_of(sigmas)
    return Sampler(sampler, (guidance_end, guidance_start), guidance_rescale, times)


def times_of(sigmas: torch.Tensor) -> tuple[float, ...]:
    """Return core's SIGMAS (steps + 1,) as times.

    A flow model of core mixes sigma · noise + (1 - sigma) · data, so its sigma is our time. Raises ValueError for the
    sigmas of other models, and for a part of a schedule.
    """
    values = sigmas.detach().double().cpu().flatten().tolist()
    falls = all(a > b for a, b in pairwise(values))
    if len(values) < 2 or not falls or not NOISE <= values[0] <= 1 or values[-1] != 0:
        first, last = (f"{values[0]:g}", f"{values[-1]:g}") if values else ("nothing", "nothing")
        raise ValueError(
            f"expected sigmas that fall from 1 to 0, got {len(values)} from {first} to {last}: use a scheduler with a "
            "flow model such as Flux or SD3, or one whose sigma_max is 1, and do not split the sigmas."
        )
    return (1.0, *values[1:])


def group_views(pictures: list[Image.Image], views_of_one_object: bool) -> list[list[Image.Image]]:
    """Return the views of each object: the whole batch shows one object, or each picture another one."""
    return [pictures] if views_of_one_object else [[picture] for picture in pictures]
