"""Check that memory does not grow from prompt to prompt, with the memory manager of a real ComfyUI, without its server.

    python -m benchmarks.comfy_memory PATH_TO_COMFYUI [--prompts 10] [--model tiny | --folder MODEL_FOLDER] [--dynamic]

Of ComfyUI's requirements, it needs only psutil, einops, comfy-aimdo, comfy-kitchen and torchvision. Each prompt is
image -> structure -> latent -> SDF -> mesh with a new seed. Its results are dropped afterwards, as ComfyUI's cache does
at the next prompt. At the end, ComfyUI's own `unload_all_models` unloads everything.

Prints a line for each prompt: seconds, faces, memory in torch's tensors on the device and its peak, memory that the
card reports as used (with other allocators and the CUDA context), resident memory, models loaded. Exits with 1 if
memory grew over the later prompts, or if weights stayed on the device after unloading.
"""

import argparse
import gc
import importlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.support.comfy_stand_ins import ComfyUI  # before ComfyUI, which has a package `tests` too

MODULES = ("", ".model_management", ".model_patcher", ".patcher_extension", ".utils", ".cli_args")
REAL = tuple(f"comfy{name}" for name in MODULES)
MIB = 1 << 20
WARM = 3  # first prompts, which may fill caches and compile kernels
ALLOWED = {"tensors": 1, "card": 64, "resident": 64}  # MiB by which memory may grow after these


def import_comfyui(folder: Path, dynamic: bool):
    """Import ComfyUI's `model_management`, on the GPU if there is one; ComfyUI does not parse our arguments.

    With `dynamic`, comfy-aimdo loads and unloads weights. The steps are those of main.py of ComfyUI 0.30, which does
    this by default on NVIDIA.
    """
    if dynamic:
        control = importlib.import_module("comfy_aimdo.control")
        control.init()
    sys.path.append(str(folder))
    importlib.import_module("comfy.options").enable_args_parsing(False)
    importlib.import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
    for name in REAL:
        importlib.import_module(name)
    if dynamic:
        if not control.init_devices([(torch.cuda.current_device(), 0)]):
            raise SystemExit("comfy-aimdo does not work here")
        patcher = sys.modules["comfy.model_patcher"]
        patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
        importlib.import_module("comfy.memory_management").aimdo_enabled = True
    return sys.modules["comfy.model_management"]


def read_picture(path: Path) -> torch.Tensor:
    """Return an image file, cut out, as IMAGE (1, H, W, 4)."""
    from d3ds2.images.foreground import cut_out
    from d3ds2.images.image_file import load_image

    return torch.from_numpy(np.array(cut_out(load_image(path)))).float()[None] / 255


def run_prompt(comfy, model, image: torch.Tensor, seed: int) -> int:
    """Run all stages on an IMAGE (1, H, W, 3 or 4); return the number of faces."""
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=image, seed=seed)[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=image, seed=seed)[0]
    return comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0].faces.shape[1]


def held(process, on_gpu: bool) -> dict[str, float]:
    """Return MiB of torch's tensors on the device, of memory that the card reports as used, and resident memory."""
    free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
    tensors = torch.cuda.memory_allocated() if on_gpu else 0
    sizes = {"tensors": tensors, "card": total - free, "resident": process.memory_info().rss}
    return {name: size / MIB for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--folder", type=Path, help="a model folder instead of a name")
    parser.add_argument("--dynamic", action="store_true", help="use comfy-aimdo, as ComfyUI does on NVIDIA")
    parser.add_argument("--image", type=Path, default=Path("workflows/demo_input.png"))
    arguments = parser.parse_args()
    management = import_comfyui(arguments.comfyui, arguments.dynamic)
    import psutil

    folder = Path(tempfile.mkdtemp())
    if arguments.folder is not None:
        (folder / "models" / "direct3d_s2").mkdir(parents=True)
        (folder / "models" / "direct3d_s2" / "given").symlink_to(arguments.folder.resolve())
    comfy = ComfyUI(folder, real=REAL)
    image, process, device = read_picture(arguments.image), psutil.Process(), management.get_torch_device()
    on_gpu = device.type == "cuda"
    model = comfy.run("LoadD3DS2Model", model="given" if arguments.folder else arguments.model)[0]
    print(f"ComfyUI on {device}, {type(model.patcher).__name__}")
    history = []
    for seed in range(arguments.prompts):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        faces = run_prompt(comfy, model, image, seed)
        gc.collect()
        history.append(held(process, on_gpu))
        most = torch.cuda.max_memory_allocated() / MIB if on_gpu else 0
        print(
            f"prompt {seed + 1}: {time.monotonic() - started:.1f} s, {faces:,} faces, "
            + ", ".join(f"{name} {size:.1f}" for name, size in history[-1].items())
            + f" MiB (tensors at most {most:.1f}), {len(management.current_loaded_models)} models loaded",
            flush=True,
        )
    warm, last = history[min(WARM, len(history)) - 1], history[-1]
    growth = {name: last[name] - warm[name] for name in ALLOWED}
    print(f"growth after prompt {WARM}: " + ", ".join(f"{name} {size:.1f}" for name, size in growth.items()) + " MiB")
    management.unload_all_models()
    management.soft_empty_cache()
    loaded = len(management.current_loaded_models)
    where = {parameter.device.type for patcher in model.get_models() for parameter in patcher.model.parameters()}
    if on_gpu:
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB of cuBLAS on Hopper, not weights
    left = held(process, on_gpu)
    sizes = ", ".join(f"{name} {size:.1f}" for name, size in left.items())
    print(f"after unload_all_models: {sizes} MiB, {loaded} models loaded, weights on {', '.join(sorted(where))}")
    tensors = [tensor for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor) and tensor.is_cuda]
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes)[:5]:
        print(f"  still there: {tuple(tensor.shape)} {tensor.dtype}, {tensor.nbytes:,} bytes")
    if (
        loaded
        or left["tensors"] > ALLOWED["tensors"]
        or where != {"cpu"}
        or any(growth[name] > most for name, most in ALLOWED.items())
    ):
        raise SystemExit("memory grew or was not released")


if __name__ == "__main__":
    main()
