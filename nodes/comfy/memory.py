"""ComfyUI's memory manager: networks in ModelPatchers, room made before they run, refusals before they fail."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP

from .sockets import Model

GB = 1 << 30
SOLIDS = ("structure_vae", "sdf_vae", "fine_sdf_vae", "refiner", "fine_refiner")  # what ComfyUI means by a VAE


def choose_dtype(network: str, precision: str) -> torch.dtype:
    """The dtype of a network on ComfyUI's device; `auto` follows the device and ComfyUI's own command-line switches."""
    chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(precision)
    if chosen is not None:
        return chosen
    device = mm.get_torch_device()
    if network in SOLIDS:
        return mm.vae_dtype(device, [torch.float16, torch.bfloat16])
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def dtype_of(network: torch.nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def make_patcher(network: torch.nn.Module) -> Any:
    """Hand a network to ComfyUI, which moves it from now on."""
    kind = comfy.model_patcher.CoreModelPatcher  # looked up here: ComfyUI may exchange it at its start
    patcher = kind(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.add_callback(CallbacksMP.ON_DETACH, _take_back)
    return patcher


def _take_back(patcher: Any, unpatch_all: bool) -> None:
    """All of an unloaded network leaves the device; ComfyUI's dynamic patcher forgets what lies beside submodules."""
    if unpatch_all:
        patcher.model.to(patcher.offload_device)


def load_networks(model: Model, names: tuple[str, ...], memory_required: int, what: str, advice: str) -> None:
    """Bring networks of a model to the device, with room for what they need beside their weights.

    Raises ValueError before any work if the device is too small altogether, saying what would help.
    """
    patchers = [model.patchers[name] for name in names]
    total = mm.get_total_memory(mm.get_torch_device())
    needed = memory_required + sum(patcher.model_size() for patcher in patchers)
    if needed > total:
        raise ValueError(
            f"{what} needs about {needed / GB:.1f} GB, and {mm.get_torch_device()} has {total / GB:.1f} GB: {advice}."
        )
    # whole networks: ours are plain modules, which ComfyUI cannot run in parts
    mm.load_models_gpu(patchers, memory_required=memory_required, force_full_load=True)
