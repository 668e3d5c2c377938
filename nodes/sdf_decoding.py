"""Latents -> SDF on the CPU, within what memory there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .device_memory import GB, dtype_of, load_networks
from .io_types import Model
from .progress import Progress, cancellable

if TYPE_CHECKING:
    from torch import Tensor

    from ..d3ds2.voxels import Voxels


def decode(
    model: Model, latents: Tensor, voxels: Voxels, memory_budget_gb: float, progress: Progress
) -> tuple[Tensor, Voxels]:
    """Decode one sample.

    Args:
        latents: (N, E) of `voxels`, a batch of one, on the CPU.
        memory_budget_gb: what decoding may take on the device; 0: what is free.

    Returns:
        sdf (512 N, 1) float32 and its voxels, on the CPU.

    Raises:
        ValueError: a budget that is too small, with the least that would do.
    """
    from ..d3ds2.activation_memory import sdf_decode_bytes
    from ..d3ds2.voxels import Voxels

    vae = model.pipeline.sdf_vae
    needed = sdf_decode_bytes(vae.config, len(voxels), dtype_of(vae))
    if memory_budget_gb and needed > memory_budget_gb * GB:
        raise ValueError(
            f"memory_budget_gb {memory_budget_gb:g} is too small: decoding {len(voxels):,} tokens needs "
            f"{needed / GB:.2f} GB. Raise it, or set it to 0 for what is free."
        )
    progress.status(f"decoding {len(voxels):,} tokens")
    load_networks(model, ("sdf_vae",), needed, f"decoding {len(voxels):,} tokens", "use a model of lower resolution")
    with cancellable(vae):
        sdf, fine = model.pipeline.decode_sdf(latents, voxels)
    return sdf.cpu(), Voxels(fine.coords.cpu(), fine.resolution, 1)
