"""Time one training step of each network at its released size on one GPU: forward, backward, no optimiser.

    python benchmarks/training_step.py --parity ../shared/parity [--gradients FOLDER]

The latent DiT (24 blocks of 1024 channels, the form of v1.1) takes a real structure of 84,820 latent voxels and its
coarsening; the structure DiT 8 samples of 16³; the SDF VAE two surfaces at 512³. Weights and inputs are random, the
parameters float32, the step under bfloat16 autocast, as `training/` runs it. Prints a table and writes it to
benchmarks/results/training-step-*.md. "host" is the time until the last kernel is launched: where it is about the whole
time, the host decides.

With --gradients, the gradients of a small latent DiT are compared instead: those of bfloat16 with those of float32, and
both with those that another version of this repository wrote to the folder, if there are any.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.dit import V11, image_tokens, make_model, peak_gib, start_of_memory, write_table  # noqa: E402
from benchmarks.structures import real_voxels, surface_voxels  # noqa: E402
from d3ds2.geometry.voxels import BLOCK, PLACES, Voxels  # noqa: E402
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig  # noqa: E402
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig  # noqa: E402
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig  # noqa: E402
from training.data.shape_batches import pack_shapes  # noqa: E402
from training.data.shape_files import StoredShape  # noqa: E402
from training.losses import SDFLossConfig  # noqa: E402
from training.train_vae import vae_loss  # noqa: E402

RECOMPUTED = {"nothing": (False, False), "all but attention": (True, False), "all": (True, True)}
VAE_RESOLUTION, VAE_SURFACES = 512, (6000, 8000)  # latent voxels of each surface
SMALL = LatentDiTConfig(depth=4, top_k=8, **V11)


def step_of(model: torch.nn.Module, loss: Callable[[], torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> Callable:
    """Return a step of a model, forward and backward, whose gradients are new tensors."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()

    return step


def latent_loss(model: LatentDiT, voxels: Voxels) -> Callable[[], torch.Tensor]:
    torch.manual_seed(1)
    context, x = image_tokens(1, 1.0), torch.randn(len(voxels), 16, device="cuda")
    t = torch.full((1,), 0.5, device="cuda")
    return lambda: model(x, t, voxels, context).float().square().mean()


def structure_loss(model: StructureDiT, samples: int) -> Callable[[], torch.Tensor]:
    context, t = image_tokens(samples, 1.0), torch.full((samples,), 0.5, device="cuda")
    x = torch.randn(samples, 8, *[model.config.resolution] * 3, device="cuda")
    return lambda: model(x, t, context).float().square().mean()


def surface(num_latents: int) -> StoredShape:
    """Return the SDF around the surface of `surface_voxels`, with a band of 4 voxels."""
    voxels = surface_voxels(num_latents, "cpu")
    xyz = voxels.coords[:, 1:].numpy()
    xyz = xyz[np.lexsort(xyz.T[::-1])]
    radius = 0.95 * (num_latents / 37.7) ** 0.5
    places = (PLACES_ARRAY + 0.5) / BLOCK
    point = (xyz[:, None] + places - voxels.resolution / 2) / radius  # (M, 512, 3)
    ripple = 0.2 * np.sin(3 * point[..., 0]) * np.sin(3 * point[..., 1] + 1) * np.sin(3 * point[..., 2] + 2)
    distance = (np.linalg.norm(point, axis=-1) - 1 - ripple) * radius * 2
    sdf = distance.clip(-1, 1).astype(np.float16).reshape(-1, BLOCK, BLOCK, BLOCK)
    held = (np.abs(sdf) < 1).reshape(len(sdf), -1).any(1)
    return StoredShape(xyz[held].astype(np.int16), sdf[held], np.abs(sdf[held]) < 0.1)


PLACES_ARRAY = np.array(PLACES)[:, 1:]  # (512, 3)


def vae_step_loss(model: SDFVAE) -> tuple[Callable[[], torch.Tensor], int]:
    """Return the loss of the surfaces, and their number of latents."""
    batch = pack_shapes([surface(number) for number in VAE_SURFACES], VAE_RESOLUTION)
    batch = type(batch)(*(part.to("cuda") if isinstance(part, torch.Tensor | Voxels) else part for part in batch))
    generator = torch.Generator("cuda")
    return lambda: vae_loss(model, batch, SDFLossConfig(), generator)["loss"], len(batch.block_coords)


def measure(step: Callable, runs: int) -> tuple[float, float]:
    """Return the medians of a step's ms, and of the ms until its last launch."""
    step()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e3 * (time.perf_counter() - start), 1e3 * (issued - start)))
    whole, host = zip(*times, strict=True)
    return statistics.median(whole), statistics.median(host)


def kernel_times(step: Callable) -> tuple[float, int, list[tuple[float, int, str]]]:
    """Return the ms that the device is busy in a step, its launches, and ms, launches and name of each kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    listed = sorted(((e.self_device_time_total / 1e3, e.count, e.key) for e in kernels), reverse=True)
    return sum(ms for ms, *_ in listed), sum(count for _, count, _ in listed), listed


def row(name: str, tokens: int, recomputed: str, model: torch.nn.Module, loss: Callable, runs: int, kernels) -> list:
    model.gradient_checkpointing, model.recompute_all = RECOMPUTED[recomputed]
    start, step = start_of_memory(), step_of(model, loss)
    whole, host = measure(step, runs)
    gib = peak_gib(start)
    busy, launches, listed = kernel_times(step)
    if kernels:
        print(f"{name}, {tokens} tokens, recomputed: {recomputed}", file=kernels)
        print("\n".join(f"{ms:9.2f} ms {count:6d}  {key[:110]}" for ms, count, key in listed[:60]), file=kernels)
    model.zero_grad(set_to_none=True)
    cells = [name, f"{tokens:,}", recomputed, f"{whole:.1f}", f"{busy:.1f}", f"{host:.1f}", f"{launches:,}"]
    print(" | ".join([*cells, f"{gib:.2f}"]), flush=True)
    return [*cells, f"{gib:.2f}"]


def compare_gradients(folder: Path, voxels: Voxels) -> None:
    """Print how far gradients are from those of float32 and of another version, as parts of their norms."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LatentDiT(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    loss, found = latent_loss(model, voxels), {}
    for dtype in (torch.float32, torch.bfloat16):
        for recomputed in RECOMPUTED:
            model.gradient_checkpointing, model.recompute_all = RECOMPUTED[recomputed]
            step_of(model, loss, dtype)()
            name = f"{str(dtype).removeprefix('torch.')}, recomputed: {recomputed}"
            found[name] = [parameter.grad.clone() for parameter in model.parameters()]
    exact = found["float32, recomputed: nothing"]
    others = {f"other version, {n}": g for n, g in torch.load(folder / "other.pt").items()} if folder.exists() else {}
    names = [name for name, _ in model.named_parameters()]
    for name, gradients in {**found, **others}.items():
        far = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients, exact, strict=True)]
        whole = sum((a - b).norm() ** 2 for a, b in zip(gradients, exact, strict=True)).sqrt()
        whole = (whole / sum(b.norm() ** 2 for b in exact).sqrt()).item()
        worst = int(np.argmax(far))
        print(f"{name}: {whole:.2e} from float32, at most {far[worst]:.2e} ({names[worst]})", flush=True)
    if not folder.exists():
        folder.mkdir(parents=True)
        torch.save({name: found[name] for name in list(found) if name.endswith("nothing")}, folder / "other.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parity", type=Path, default=ROOT.parent / "shared" / "parity", help="folder with the real structure"
    )
    parser.add_argument("--gradients", type=Path, help="compare gradients with those in this folder, or write them")
    parser.add_argument("--kernels", type=Path, help="file for the times of all kernels")
    parser.add_argument("--without", nargs="*", default=[], choices=list(RECOMPUTED), help="forms to leave out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    whole, coarse = (real_voxels(arguments.parity, "cuda", factor) for factor in (1, 2))
    if arguments.gradients:
        return compare_gradients(arguments.gradients, coarse)

    header = ["network", "tokens", "recomputed", "step ms", "device ms", "host ms", "launches", "GiB"]
    lines, forms = [header, ["---"] * len(header)], [form for form in RECOMPUTED if form not in arguments.without]
    kernels = arguments.kernels.open("w") if arguments.kernels else None
    model = make_model(V11, 8, torch.float32)
    for voxels, runs in ((coarse, 5), (whole, 3)):
        loss = latent_loss(model, voxels)
        lines += [row("latent DiT", len(voxels), form, model, loss, runs, kernels) for form in forms]
    torch.manual_seed(0)
    model = StructureDiT(StructureDiTConfig()).cuda()
    loss = structure_loss(model, 8)
    lines.append(row("structure DiT", 8 * 16**3, "nothing", model, loss, 5, kernels))
    torch.manual_seed(0)
    model = SDFVAE(SDFVAEConfig()).cuda()
    loss, latents = vae_step_loss(model)
    lines += [row("SDF VAE", latents, form, model, loss, 5, kernels) for form in ("nothing", "all")]
    about = "Weights in float32, steps under bfloat16 autocast. `python benchmarks/training_step.py`."
    write_table(arguments.out, "training-step", "One training step", about, lines)


if __name__ == "__main__":
    main()
