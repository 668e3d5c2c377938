"""Latents -> SDF, in as few chunks as the memory allows -> mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management as mm

from .memory import GB, dtype_of, load_networks
from .progress import Progress, cancellable, check_cancelled, run_cancellable, run_networks
from .sockets import Model, Structure

if TYPE_CHECKING:
    from torch import Tensor

    from ...d3ds2.geometry.sdf_blocks import SDFBlocks
    from ...d3ds2.geometry.voxels import Voxels
    from ...d3ds2.meshes.mesh import Mesh
    from ...d3ds2.networks.sdf_vae import SDFVAE

MOST_GB = 1_000_000
FREE_SHARE = 0.8  # of the free memory may be used; the rest is for what cannot be foreseen


def least_bytes(model: Model, resolution: int, tokens: int) -> int:
    """Return the least memory in which a structure of so many tokens can be decoded, in the smallest chunks."""
    from ...d3ds2.networks.chunked_decode import HALO

    kept, each = _bytes(model, resolution, tokens)
    return kept + each * min(tokens, (2 * HALO + 1) ** 3)


def check_budget(model: Model, resolution: int, tokens: int, memory_budget_gb: float) -> None:
    """Raise ValueError if a budget is too small; the message says how much is needed. 0 is no budget."""
    least = least_bytes(model, resolution, tokens)
    if memory_budget_gb and memory_budget_gb * GB < least:
        raise ValueError(
            f"memory_budget_gb {memory_budget_gb:g} is too small: decoding {tokens:,} tokens needs at least "
            f"{least / GB:.2f} GB. Raise it, or set it to 0 to use what is free."
        )


def check_budgets_ahead(model: Model, structure: Structure, hidden: Any) -> None:
    """Raise ValueError, as `check_budget`, if a VAE Decode SDF that gets this node's latent could not run.

    Latents are sampled for minutes before they are decoded. `hidden` holds the node's id and the prompt; what is not in
    the prompt, such as a budget that another node gives, is checked when it comes.
    """
    largest = max(structure.coords[:, 0].bincount().tolist())
    for node in (hidden.prompt or {}).values():
        inputs = node["inputs"]
        budget = inputs.get("memory_budget_gb")
        if node["class_type"] == "D3DS2VAEDecodeSDF" and inputs.get("latent") == [str(hidden.unique_id), 0]:
            check_budget(model, structure.resolution, largest, budget if isinstance(budget, (int, float)) else 0)


def decode(model: Model, latents: Tensor, voxels: Voxels, memory_budget_gb: float, progress: Progress) -> SDFBlocks:
    """Decode one sample.

    Args:
        latents: (N, E) on the CPU, one row per voxel.
        voxels: a batch of one.
        memory_budget_gb: memory that decoding may use on the device; 0 uses what is free.
        progress: gets a text at every chunk.

    Returns:
        The distances, on the device.

    Raises:
        ValueError: the budget is too small; the message says how much is needed.
    """
    if not 0 <= memory_budget_gb < MOST_GB:
        raise ValueError(f"expected a memory_budget_gb from 0 to {MOST_GB:,}, got {memory_budget_gb}")
    stage, N = model.stages[voxels.resolution], len(voxels)
    name, vae = f"{stage.prefix}sdf_vae", stage.sdf_vae
    check_budget(model, voxels.resolution, N, memory_budget_gb)
    kept, each = _bytes(model, voxels.resolution, N)
    whole, least = kept + each * N, least_bytes(model, voxels.resolution, N)
    what = f"decoding {N:,} tokens"
    load_networks(model, (name,), least, what, "use a model of lower resolution")
    budget = int(memory_budget_gb * GB)
    if not budget:
        mm.load_models_gpu([model.patchers[name]], memory_required=whole, force_full_load=True)
        budget = max(least, min(whole, int(FREE_SHARE * mm.get_free_memory(mm.get_torch_device()))))
    progress.status(what)
    try:
        return _decode(vae, latents, voxels, budget, progress)
    except mm.OOM_EXCEPTION:  # another program may use the GPU too: try once more, with half the budget
        mm.soft_empty_cache()
    return _decode(vae, latents, voxels, max(least, budget // 2), progress)


def _bytes(model: Model, resolution: int, tokens: int) -> tuple[int, int]:
    """Return the bytes that decoding keeps, and those for each token of a chunk."""
    from ...d3ds2.networks.chunked_decode import kept_bytes, latent_bytes

    vae = model.stages[resolution].sdf_vae
    size, dtype = vae.config.hidden_size, dtype_of(vae)
    return kept_bytes(size, tokens, dtype, mm.get_torch_device()), 2 * latent_bytes(size, dtype)


def extract(model: Model, blocks: SDFBlocks, *options) -> tuple[list[Mesh], SDFBlocks]:
    """Return the meshes of blocks, and the blocks on the CPU.

    Meshes are extracted on the blocks' device, or on the CPU if the device runs out of memory. `options` and errors
    are those of `Pipeline.blocks_to_meshes`.
    """
    from ...d3ds2.geometry.sdf_blocks import SDFBlocks

    on_cpu = SDFBlocks(blocks.coords.cpu(), blocks.values.cpu(), blocks.resolution, blocks.batch_size)
    try:
        return run_cancellable(model.pipeline.blocks_to_meshes, blocks, *options), on_cpu
    except mm.OOM_EXCEPTION:
        return run_cancellable(model.pipeline.blocks_to_meshes, on_cpu, *options), on_cpu


def _decode(vae: SDFVAE, latents: Tensor, voxels: Voxels, budget: int, progress: Progress) -> SDFBlocks:
    from ...d3ds2.networks.chunked_decode import decode_in_chunks

    def on_chunk(done: int, count: int) -> None:
        check_cancelled()
        progress.status(f"decoding: {done:,} of {count:,} tokens")

    device = mm.get_torch_device()
    arguments = vae, latents.to(device), voxels.to(device), budget, None, on_chunk
    with cancellable(vae):
        return run_networks(device, decode_in_chunks, *arguments)
