"""Mean and spread of a VAE's latents. The diffusion models see latents normalised by these."""

import dataclasses

import torch
from torch import Tensor, nn

from d3ds2.kernels.devices import has_float64


class LatentMoments:
    """Sums over the posteriors added so far, for each channel."""

    def __init__(self, channels: int, device: torch.device):
        self.count = 0
        device = device if has_float64(device) else torch.device("cpu")
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.sum_of_squares = torch.zeros_like(self.sum)

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Count posteriors: mean and logvar, each (M, C)."""
        mean, logvar = (x.to(self.sum.device).double() for x in (mean, logvar))
        variance = logvar.exp()
        self.count += len(mean)
        self.sum += mean.sum(0)
        self.sum_of_squares += (mean.square() + variance).sum(0)

    def summary(self) -> dict[str, float | list[float]]:
        """Return shift and scale for which (latents - shift) * scale has mean 0 and variance 1, and channel statistics.

        Raises:
            ValueError: no posterior was added.
        """
        if self.count == 0:
            raise ValueError("expected at least one posterior, got none")
        mean, square = self.sum / self.count, self.sum_of_squares / self.count
        shift = mean.mean()
        scale = (square.mean() - shift.square()).clamp(min=1e-12).rsqrt()
        std = (square - mean.square()).clamp(min=0).sqrt()
        return {
            "latents_shift": shift.item(),
            "latents_scale": scale.item(),
            "mean_of_channels": mean.tolist(),
            "std_of_channels": std.tolist(),
        }


def set_latent_scale(vae: nn.Module, moments: LatentMoments) -> None:
    """Write the shift and scale of the latents into the VAE's config."""
    summary = moments.summary()
    vae.config = dataclasses.replace(
        vae.config, latents_shift=summary["latents_shift"], latents_scale=summary["latents_scale"]
    )
