"""The losses of the paper.

In a packed batch every token (or voxel) counts equally: a loss is the mean over the batch, not over its shapes.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.rectified_flow import sample_t, velocity_target


@dataclass(frozen=True)
class SDFLossConfig:
    """Weights of eq. 3, and of a further term on the sign alone, which keeps thin parts alive [D]."""

    inside: float = 1.0  # lambda_in: active voxels, |s| < 1 [A]
    exterior: float = 0.1  # lambda_ext: the other voxels of the decoded blocks [A]
    sharp: float = 1.0  # lambda_sharp: active voxels near sharp edges [A]
    kl: float = 1e-3  # lambda_KL [A]
    sign: float = 0.0  # all voxels: divergence of inside and outside, see `sign_divergence`


@dataclass(frozen=True)
class FlowLossConfig:
    """How a diffusion model is trained; the paper does not say [D]."""

    time_mean: float = 1.0  # mean of the normal distribution of logit(t)
    time_std: float = 1.0  # its standard deviation
    noise_alone: float = 0.0  # share of samples at t = 1, where only the image hints at x_0: trains an encoder faster
    context_dropout: float = 0.1  # probability of dropping the image, for classifier-free guidance
    sample_posterior: bool = True  # draw x_0 from the VAE's posterior; else take its mean

    def __post_init__(self):
        if not 0 <= self.noise_alone <= 1:
            raise ValueError(f"expected loss.noise_alone in [0, 1], got {self.noise_alone}")


@dataclass(frozen=True)
class SurfaceLossConfig:
    """The loss of the SDF that predicted latents decode to; none of it comes from the paper [D]."""

    weight: float = 1.0  # of |s - s'|, and of what is added to it
    share: float = 0.1  # of the samples that are decoded: decoding takes much longer than predicting
    sign: float = 0.0  # adds so many times the divergence of inside and outside, see `sign_divergence`
    slope: float = 0.0  # adds so many times the squared error of the slope, in bands a voxel: against ripples
    surplus: bool = False  # decode surplus blocks too, which should be empty: for networks without surplus_value

    def __post_init__(self):
        if self.weight < 0 or not 0 <= self.share <= 1:
            raise ValueError(f"expected surface.weight >= 0 and share in [0, 1], got {self.weight} and {self.share}")
        if self.sign < 0 or self.slope < 0:
            raise ValueError(f"expected surface.sign and slope >= 0, got {self.sign} and {self.slope}")


@dataclass(frozen=True)
class StructureLossConfig:
    """Weights of the structure VAE's loss; the paper does not state one [D]."""

    bce: float = 1.0
    dice: float = 0.0
    positive_weight: float = 1.0  # of an occupied voxel in the cross-entropy
    kl: float = 1e-3


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Average KL(N(mean, exp(logvar)) || N(0, 1)) over all elements. The mean, rather than the sum, is [C]."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def sign_divergence(sdf: Tensor, target: Tensor, width: float = 0.1) -> Tensor:
    """KL divergence between probabilities of "inside", sigmoid(-s / width), elementwise: (N,), (N,) -> (N,).

    A squared error hardly notices that a thin wall has vanished, since its few voxels are only just below zero. Here
    the side of the surface counts, within about `width` of it.
    """
    logits, wanted = sdf / width, target / width
    return F.softplus(-logits) - F.softplus(-wanted) + torch.sigmoid(-wanted) * (logits - wanted)


SDF_TERMS = ("inside", "exterior", "sharp", "sign", "kl")


def count_sdf(target: Tensor, sharp: Tensor, latents: int) -> Tensor:
    """Count over what each of SDF_TERMS is a mean, (5,) int64; arguments as for `sdf_loss`, and its L latents."""
    active = target.flatten().abs() < 1
    inside, near = active.sum(), (active & sharp.flatten()).sum()
    others = inside.new_tensor([active.numel(), latents])
    return torch.stack([inside, others[0] - inside, near, *others])


def sdf_loss(
    sdf: Tensor,
    target: Tensor,
    sharp: Tensor,
    mean: Tensor,
    logvar: Tensor,
    config: SDFLossConfig,
    shares: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Eq. 2-3: weighted mean squared errors over three sets of voxels, and the KL divergence.

    Args:
        sdf: decoded values of all voxels of all blocks, (N, 1) or (N,).
        target: as many true values in [-1, 1]. Voxels with |target| < 1 are active.
        sharp: as many bools, the voxels near sharp edges; those outside the band do not count.
        mean, logvar: the posterior, (L, C).
        shares: for a part of a batch, the factor of each term, its share of the values that `count_sdf` counts.

    Returns:
        "loss" and its unweighted terms "inside", "exterior", "sharp", "sign", "kl", each a scalar float32. An empty
        set of voxels has error 0.

    Raises:
        ValueError: the numbers of values differ.
    """
    if sdf.numel() != target.numel() or sharp.numel() != target.numel():
        raise ValueError(
            f"expected as many values as targets, got sdf {tuple(sdf.shape)}, target {tuple(target.shape)}, "
            f"sharp {tuple(sharp.shape)}"
        )
    target = target.flatten().float()
    sdf = sdf.flatten().float()
    error = (sdf - target).square()  # (N,)
    active = target.abs() < 1
    terms = {
        "inside": _mean_over(error, active),  # eq. 2
        "exterior": _mean_over(error, ~active),
        "sharp": _mean_over(error, active & sharp.flatten()),
        "sign": sign_divergence(sdf, target).mean(),
        "kl": kl_divergence(mean, logvar),
    }
    if shares is not None:
        terms = {name: shares[name] * term for name, term in terms.items()}
    return {"loss": sum(getattr(config, name) * term for name, term in terms.items()), **terms}  # eq. 3


def _mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def structure_loss(
    logits: Tensor, occupancy: Tensor, mean: Tensor, logvar: Tensor, config: StructureLossConfig
) -> dict[str, Tensor]:
    """Cross-entropy and dice loss of the occupancy, and the KL divergence.

    Args:
        logits, occupancy: (B, 1, G, G, G); occupancy in {0, 1}.
        mean, logvar: the posterior, (B, C, g, g, g).

    Returns:
        "loss", its unweighted terms "bce", "dice", "kl", and "iou", the IoU of {logits > 0} and the occupancy.

    Raises:
        ValueError: the shapes of logits and occupancy differ.
    """
    if logits.shape != occupancy.shape:
        raise ValueError(f"expected logits {tuple(occupancy.shape)}, got {tuple(logits.shape)}")
    logits, occupancy = logits.float(), occupancy.float()
    weight = torch.tensor(config.positive_weight, device=logits.device)
    p = logits.sigmoid()
    overlap = 2 * (p * occupancy).flatten(1).sum(1) + 1
    terms = {
        "bce": F.binary_cross_entropy_with_logits(logits, occupancy, pos_weight=weight),
        "dice": (1 - overlap / ((p + occupancy).flatten(1).sum(1) + 1)).mean(),
        "kl": kl_divergence(mean, logvar),
    }
    loss = sum(getattr(config, name) * term for name, term in terms.items())
    predicted, occupied = logits > 0, occupancy > 0
    iou = (predicted & occupied).sum() / (predicted | occupied).sum().clamp(min=1)
    return {"loss": loss, **terms, "iou": iou}


DrawRows = Callable[[int, Callable[[int], Tensor]], Tensor]  # number, make -> rows of random numbers


def draw_all(number: int, make: Callable[[int], Tensor]) -> Tensor:
    """Return `make(number)`: all rows. A part of a batch draws as `training.data.parts` says."""
    return make(number)


def draw_noise(like: Tensor, generator: torch.Generator, draw_rows: DrawRows = draw_all) -> Tensor:
    """Draw normal noise, shaped as a tensor (N, ...) and on its device; the generator may be on the CPU."""
    device, row = generator.device, like.shape[1:]
    return draw_rows(len(like), lambda N: torch.randn((N, *row), generator=generator, device=device)).to(like.device)


def keep_context(batch_size: int, config: FlowLossConfig, generator: torch.Generator) -> Tensor:
    """Draw which samples keep their image: (B,) bool on the generator's device."""
    return torch.rand(batch_size, generator=generator, device=generator.device) >= config.context_dropout


def training_times(batch_size: int, config: FlowLossConfig, generator: torch.Generator) -> Tensor:
    """Draw times (B,) float32 on the generator's device: logit-normal, and 1 for a share of the samples."""
    t = sample_t(batch_size, generator, config.time_mean, config.time_std)
    if config.noise_alone == 0:
        return t
    alone = torch.rand(batch_size, generator=generator, device=generator.device) < config.noise_alone
    return torch.where(alone, 1.0, t)


def velocity_loss(predicted: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity over all elements (eq. 11).

    All three are (N, C), or (B, C, g, g, g) for dense latents. Returns a scalar float32.
    """
    return F.mse_loss(predicted.float(), velocity_target(x_0, noise).float())
