"""Rectified flow: x_t = (1 - t) x_0 + t noise, its time law, and the samplers with guidance (eq. 10-11).

Time t is in [0, 1]; 1 is noise, 0 is data. The velocity is noise - x_0, so a step from t to t' adds (t' - t) velocity.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .geometry.voxels import Voxels
from .networks.image_encoder import ImageTokens
from .networks.latent_dit import LatentDiT
from .networks.structure_dit import StructureDiT
from .storage.model_folder import MOST_STEPS

SAMPLERS = ("euler", "heun")  # of integration
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


@dataclass(frozen=True)
class Sampler:
    """How a flow is integrated, beside its steps, shift and guidance scale. The defaults are the released pipeline's.

    Args:
        method: "euler"; or "heun", which evaluates the velocity at both ends of each step but the last: two
            evaluations per step.
        guidance_interval: the smallest and the largest time at which guidance acts. At other times only the branch
            with the image is evaluated, in half the time (Kynkäänniemi et al. 2024).
        guidance_rescale: from 0, not at all, to 1: bring the spread of the guided x_0 back to that of the branch with
            the image (Lin et al. 2023).
        times: falling times from 1 to 0, instead of the model's own schedule and number of steps.

    Raises:
        ValueError: a value is outside its range.
    """

    method: str = SAMPLERS[0]
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        low, high = self.guidance_interval
        if self.method not in SAMPLERS:
            raise ValueError(f"expected a sampler of {', '.join(SAMPLERS)}, got {self.method!r}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"expected a guidance interval with 0 <= low <= high <= 1, got {low} and {high}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"expected a guidance rescale from 0 to 1, got {self.guidance_rescale}")
        if self.times is not None:
            falling = all(t > t_next for t, t_next in pairwise(self.times))
            if not 2 <= len(self.times) <= MOST_STEPS + 1 or not falling or self.times[0] != 1 or self.times[-1] != 0:
                found = f"{len(self.times)} from {self.times[:1]} to {self.times[-1:]}"
                raise ValueError(f"expected up to {MOST_STEPS + 1} times that fall from 1 to 0, got {found}")

    def steps(self, default: int) -> int:
        """Return the number of steps: that of `times`, or the default."""
        return default if self.times is None else len(self.times) - 1

    def schedule(self, steps: int, shift: float) -> Tensor:
        """Return `times`, or `time_schedule(steps, shift)`: (steps + 1,) float64."""
        return time_schedule(steps, shift) if self.times is None else torch.tensor(self.times, dtype=torch.float64)


EULER = Sampler()


def guided_velocity(
    model: LatentDiT | StructureDiT,
    image_tokens: ImageTokens,
    guidance_scale: float,
    voxels: Voxels | None = None,
    together: bool = True,
    half_times: bool = False,
    sampler: Sampler = EULER,
) -> Velocity:
    """Classifier-free guidance: v_u + guidance_scale (v_c - v_u).

    Args:
        model: the transformer; a `LatentDiT` also needs `voxels`.
        image_tokens: the condition; without condition its features are zero.
        guidance_scale: 1 evaluates the conditional branch alone.
        voxels: the structure of the latents.
        together: both branches in one batch; otherwise one after the other, with half the memory.
        half_times: tell the model `half_precision_time(t)`, as the released pipeline does.
        sampler: the times at which guidance acts, and its rescale.

    Returns:
        velocity(x_t, t): x_t of the model's shape, t one time for all samples.

    Raises:
        ValueError: guidance_scale is beyond MOST_GUIDANCE.
    """
    if not abs(guidance_scale) <= MOST_GUIDANCE:
        raise ValueError(f"expected a guidance_scale up to {MOST_GUIDANCE}, got {guidance_scale}")
    low, high = sampler.guidance_interval
    branches = [image_tokens] if guidance_scale == 1 else [image_tokens, image_tokens.zeroed()]
    passes = [ImageTokens.cat(branches)] if together and len(branches) > 1 else branches

    def evaluate(x_t: Tensor, t: float, contexts: list[ImageTokens], copies: int) -> list[Tensor]:
        outputs, t = [], half_precision_time(t) if half_times else t
        geometry = () if voxels is None else (voxels.repeat(copies) if copies > 1 else voxels,)
        for context in contexts:
            times = torch.full((context.batch_size,), t, dtype=torch.float32, device=x_t.device)
            outputs += model(torch.cat([x_t] * copies), times, *geometry, context).chunk(copies)
        return outputs

    def velocity(x_t: Tensor, t: float) -> Tensor:
        if len(branches) == 1 or not low <= t <= high:
            return evaluate(x_t, t, [image_tokens], 1)[0]
        conditional, unconditional = evaluate(x_t, t, passes, len(branches) // len(passes))
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if not sampler.guidance_rescale or t == 0:
            return guided
        counts = [1] * len(x_t) if voxels is None else voxels.counts
        return rescaled(guided, conditional, x_t, t, counts, sampler.guidance_rescale)

    return velocity


def rescaled(guided: Tensor, conditional: Tensor, x_t: Tensor, t: float, counts: list[int], amount: float) -> Tensor:
    """Bring the spread of the guided x_0 back to that of the conditional one, of each sample on its own.

    Args:
        guided, conditional: velocities at x_t, all three (N, E) or (B, E, R, R, R).
        t: above 0.
        counts: rows of each sample.
        amount: 1 brings all of it back, 0 nothing.

    Returns:
        The velocity that points to the rescaled x_0.
    """
    velocities = []
    for x, v, c in zip(x_t.split(counts), guided.split(counts), conditional.split(counts), strict=True):
        x_0, spread = x - t * v, (x - t * c).std()
        x_0 = x_0 * (1 - amount + amount * spread / x_0.std().clamp_min(torch.finfo(x_0.dtype).tiny))
        velocities.append((x - x_0) / t)
    return torch.cat(velocities)


def mean_velocity(
    model: LatentDiT | StructureDiT, views: Sequence[ImageTokens], guidance_scale: float, **options
) -> Velocity:
    """The mean of the guided velocities for several views of the same objects, evaluated one after the other.

    Args:
        views: the tokens of B images each, one image of every object.
        guidance_scale, options: as in `guided_velocity`.
    """
    velocities = [guided_velocity(model, view, guidance_scale, **options) for view in views]
    if len(velocities) == 1:
        return velocities[0]

    def velocity(x_t: Tensor, t: float) -> Tensor:
        total = torch.zeros_like(x_t)
        for one in velocities:
            total += one(x_t, t)
        return total / len(velocities)

    return velocity


@torch.no_grad()
def euler_sample(
    velocity: Velocity, noise: Tensor, times: Tensor, on_step: OnStep | None = None, method: str = SAMPLERS[0]
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) along `times`, from noise to data.

    Args:
        velocity: function of (x_t, t), t a float.
        noise: x at times[0].
        times: falling times, (steps + 1,), as `time_schedule` gives them.
        on_step: called with (number of the finished step from 0, x after it, the data x_0 that its velocity points
            to); may raise to stop.
        method: see `Sampler`. Heun's takes the mean of the velocities at both ends of an Euler step.

    Returns:
        x at times[-1], in the dtype of the noise.
    """
    x_t, times = noise, times.tolist()
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x_t, t).to(x_t.dtype)
        if method == "heun" and t_next > 0:  # at 0 there is no noise left, and no model was trained there
            v = (v + velocity(x_t + (t_next - t) * v, t_next).to(x_t.dtype)) / 2
        x_t = x_t + (t_next - t) * v
        if on_step is not None:
            on_step(step, x_t, x_t - t_next * v)
    return x_t
