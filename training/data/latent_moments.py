"""Mean and spread of a VAE's latents. The diffusion models see latents normalised by these.

`latents/<R>/moments.json` holds those of the latents at R, and the fingerprint of the encoder that made them.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from d3ds2.kernels.devices import has_float64
from training.data.shape_files import latent_path


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

    def add_sums(self, sums: dict) -> None:
        """Count the posteriors that `sums` adds up: count, and for each channel sum and sum_of_squares."""
        self.count += sums["count"]
        self.sum += torch.tensor(sums["sum"], dtype=torch.float64, device=self.sum.device)
        self.sum_of_squares += torch.tensor(sums["sum_of_squares"], dtype=torch.float64, device=self.sum.device)

    def sums(self) -> dict:
        """Return what `add_sums` takes."""
        return {"count": self.count, "sum": self.sum.tolist(), "sum_of_squares": self.sum_of_squares.tolist()}

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


# --- the latents of a data_dir and the VAE of a model folder


def encoder_fingerprint(vae: nn.Module) -> str:
    """Hash all of a VAE that its latents depend on before they are normalised."""
    config = dataclasses.replace(vae.config, latents_shift=0.0, latents_scale=1.0)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config)).encode())
    for tensor in vae.encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def moments_path(data_dir: str | Path, resolution: int) -> Path:
    """The file of the moments at a resolution."""
    return latent_path(data_dir, resolution, "", 0).with_name("moments.json")


def read_moments(file: Path) -> dict:
    """Read moments.json, or one task's part of it; {} if it is missing or damaged: encode_latents makes it again."""
    try:
        moments = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return moments if isinstance(moments, dict) else {}


def check_latents(data_dir: str | Path, resolution: int, vae: nn.Module, model_dir: str | Path) -> None:
    """Check that latents were made by this VAE, and that its config has their scale.

    The scale may be that of another resolution, since one model has one scale for all of them.

    Raises:
        ValueError: the latents are unfinished, of another VAE, or the VAE does not know their scale.
    """
    file, again = moments_path(data_dir, resolution), "run python -m training.encode_latents"
    moments, encoder = read_moments(file), encoder_fingerprint(vae)
    if not moments:
        raise ValueError(f"the latents in {file.parent} are not finished: {again}, which writes {file.name}")
    if moments.get("encoder", encoder) != encoder:  # older versions do not say it
        raise ValueError(f"the latents in {file.parent} are of another VAE than the sdf_vae in {model_dir}: {again}")
    known = (vae.config.latents_shift, vae.config.latents_scale)
    for other in file.parents[1].glob("*/moments.json"):
        moments = read_moments(other)
        same = moments.get("encoder", encoder) == encoder
        if same and known == (moments.get("latents_shift"), moments.get("latents_scale")):
            return
    raise ValueError(f"the sdf_vae in {model_dir} does not have the scale of the latents in {file.parent}: {again}")
