"""Rectified flow: x_t = (1 - t) x_0 + t noise, its time law, and the Euler sampler with guidance (eq. 10-11).

Time t is in [0, 1]; 1 is noise, 0 is data. The velocity is noise - x_0, so a step from t to t' adds (t' - t) velocity.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .geometry.voxels import Voxels
from .networks.image_encoder import ImageTokens
from .networks.latent_dit import LatentDiT
from .networks.structure_dit import StructureDiT
from .storage.model_folder import MOST_STEPS

MOST_GUIDANCE = 1000
TRAINING_STEPS = 1000  # of the released scheduler; its last time before 0 follows from it

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]  # finished step, x_t, x_0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """shift · t / (1 + (shift - 1) t), for t of any shape: more of the steps near the noise."""
    return shift * t / (1 + (shift - 1) * t)


def time_schedule(steps: int, shift: float) -> Tensor:
    """Times of the sampler, (steps + 1,) float64, from 1 down to 0.

    As the released scheduler does, the shift is applied twice to the end of the schedule: the smallest time is
    shift(1 / 1000), the times run evenly from 1 to it, and all are shifted once more; then 0.

    Raises:
        ValueError: for fewer than one step or more than MOST_STEPS, or a shift that is not positive and finite.
    """
    if not 1 <= steps <= MOST_STEPS or not 0 < shift < math.inf:
        raise ValueError(f"expected 1 to {MOST_STEPS} steps and a positive shift, got {steps} and {shift}")
    t_min = shift_time(torch.tensor(1 / TRAINING_STEPS, dtype=torch.float64), shift).item()
    times = shift_time(torch.linspace(1, t_min, steps, dtype=torch.float64), shift)
    return torch.cat([times, times.new_zeros(1)])


def half_precision_time(t: float) -> float:
    """The time the released pipeline tells its models, which is 1000 t rounded to float16."""
    return torch.tensor(1000 * t, dtype=torch.float64).half().item() / 1000


def sample_t(batch_size: int, generator: torch.Generator, mean: float = 1.0, std: float = 1.0) -> Tensor:
    """Training times (B,) float32 on the generator's device: logit-normal, sigmoid of a normal variable."""
    return torch.sigmoid(mean + std * torch.randn(batch_size, generator=generator, device=generator.device))


def interpolate(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of eq. 10, for x_0 and noise (N, E) or (B, E, R, R, R); t broadcasts against them."""
    return (1 - t) * x_0 + t * noise


def velocity_target(x_0: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the model learns to predict, d x_t / d t (eq. 11), for (N, E) or (B, E, R, R, R)."""
    return noise - x_0


def noise_for(seeds: list[int], shapes: list[tuple[int, ...]]) -> Tensor:
    """Standard normal noise of each sample from its own seed, concatenated along the first dimension, on the CPU.

    Latents take shapes (tokens, channels), dense structures (1, channels, R, R, R). One seed gives one sample, whatever
    the device or its place in the batch.

    Raises:
        ValueError: the numbers of seeds and shapes differ, or a seed has more than 64 bits.
    """
    if any(not -(2**63) <= seed < 2**64 for seed in seeds):
        raise ValueError(f"expected seeds of 64 bits, got {seeds}")
    if len(seeds) != len(shapes):
        raise ValueError(f"expected a seed for each sample, got {len(seeds)} seeds and {len(shapes)} shapes")
    samples = zip(seeds, shapes, strict=True)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in samples])


def guided_velocity(
    model: LatentDiT | StructureDiT,
    image_tokens: ImageTokens,
    guidance_scale: float,
    voxels: Voxels | None = None,
    together: bool = True,
    half_times: bool = False,
) -> Velocity:
    """Classifier-free guidance: v_u + guidance_scale (v_c - v_u).

    Args:
        model: the transformer; a `LatentDiT` also needs `voxels`.
        image_tokens: the condition; without condition its features are zero.
        guidance_scale: 1 evaluates the conditional branch alone.
        voxels: the structure of the latents.
        together: both branches in one batch; otherwise one after the other, with half the memory.
        half_times: tell the model `half_precision_time(t)`, as the released pipeline does.

    Returns:
        velocity(x_t, t): x_t of the model's shape, t one time for all samples.

    Raises:
        ValueError: guidance_scale is beyond MOST_GUIDANCE.
    """
    if not abs(guidance_scale) <= MOST_GUIDANCE:
        raise ValueError(f"expected a guidance_scale up to {MOST_GUIDANCE}, got {guidance_scale}")
    branches = [image_tokens] if guidance_scale == 1 else [image_tokens, image_tokens.zeroed()]
    passes = [ImageTokens.cat(branches)] if together and len(branches) > 1 else branches
    per_pass = len(branches) // len(passes)
    geometry = () if voxels is None else (voxels.repeat(per_pass) if per_pass > 1 else voxels,)

    def velocity(x_t: Tensor, t: float) -> Tensor:
        outputs, t = [], half_precision_time(t) if half_times else t
        for context in passes:
            times = torch.full((context.batch_size,), t, dtype=torch.float32, device=x_t.device)
            outputs += model(torch.cat([x_t] * per_pass), times, *geometry, context).chunk(per_pass)
        if len(outputs) == 1:
            return outputs[0]
        conditional, unconditional = outputs
        return unconditional + guidance_scale * (conditional - unconditional)

    return velocity


@torch.no_grad()
def euler_sample(velocity: Velocity, noise: Tensor, times: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dt = velocity(x, t) along `times`, from noise to data.

    Args:
        velocity: function of (x_t, t), t a float.
        noise: x at times[0].
        times: falling times, (steps + 1,), as `time_schedule` gives them.
        on_step: called with (number of the finished step from 0, x after it, the data x_0 that its velocity points
            to); may raise to stop.

    Returns:
        x at times[-1], in the dtype of the noise.
    """
    x_t, times = noise, times.tolist()
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x_t, t).to(x_t.dtype)
        x_t = x_t + (t_next - t) * v
        if on_step is not None:
            on_step(step, x_t, x_t - t_next * v)
    return x_t
