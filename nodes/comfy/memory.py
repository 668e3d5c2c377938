"""ComfyUI's memory manager: wraps networks in ModelPatchers, makes room before they run, refuses what cannot fit."""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP

from ...d3ds2.kernels.devices import find_dtype
from .sockets import Model

GB = 1 << 30
SOLIDS = ("structure_vae", "sdf_vae", "fine_sdf_vae", "refiner", "fine_refiner")  # these take ComfyUI's VAE dtype


def choose_dtype(network: str, precision: str) -> torch.dtype:
    """Return the dtype for a network on ComfyUI's device; `auto` follows the device and ComfyUI's own options."""
    device = mm.get_torch_device()
    if precision != "auto":
        return find_dtype(precision, device)
    if network in SOLIDS:
        return mm.vae_dtype(device, [torch.float16, torch.bfloat16])
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def dtype_of(network: torch.nn.Module) -> torch.dtype:
    """Return the dtype of a network's parameters."""
    return next(network.parameters()).dtype


def make_patcher(network: torch.nn.Module) -> Any:
    """Wrap a network in a ModelPatcher; from then on ComfyUI moves it between devices."""
    kind = comfy.model_patcher.CoreModelPatcher  # looked up only now: ComfyUI may replace it while it starts
    patcher = kind(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.add_callback(CallbacksMP.ON_DETACH, _take_back)
    return patcher


def _take_back(patcher: Any, unpatch_all: bool) -> None:
    """Move all of an unloaded network off the device; ComfyUI's dynamic patcher leaves parameters beside submodules."""
    if unpatch_all:
        patcher.model.to(patcher.offload_device)


def load_networks(model: Model, names: tuple[str, ...], memory_required: int, what: str, advice: str) -> None:
    """Load networks of a model onto the device, with `memory_required` bytes of room beside their weights.

    Raises ValueError, made of `what` and `advice`, before any work if the device is too small.
    """
    patchers = [model.patchers[name] for name in names]
    total = mm.get_total_memory(mm.get_torch_device())
    needed = memory_required + sum(patcher.model_size() for patcher in patchers)
    if needed > total:
        raise ValueError(
            f"{what} needs about {needed / GB:.1f} GB, but {mm.get_torch_device()} has {total / GB:.1f} GB: {advice}."
        )
    # load whole networks: they are plain modules, which ComfyUI cannot run when only partly loaded
    mm.load_models_gpu(patchers, memory_required=memory_required, force_full_load=True)
    for name, patcher in zip(names, patchers, strict=True):
        _bring_whole(name, patcher)


def _bring_whole(name: str, patcher: Any) -> None:
    """Bring what ComfyUI left behind: with --novram it leaves all weights, and the network would run on the CPU.

    Raises ValueError if ComfyUI does not bring it even when asked.
    """
    if _left_behind(patcher):
        patcher.partially_load(patcher.load_device, sys.maxsize)
    if left := _left_behind(patcher):
        raise ValueError(
            f"{name} runs only as a whole, and ComfyUI left {left / GB:.2f} GB of it off {patcher.load_device}: start "
            "ComfyUI without --novram."
        )


def _left_behind(patcher: Any) -> int:
    """The bytes of a network that are not on the device where it is to run."""
    tensors = [*patcher.model.parameters(), *patcher.model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != torch.device(patcher.load_device).type)
