"""Time the latent DiT at full size on one GPU: a forward pass and a training step.

    python benchmarks/dit.py --parity ../shared/parity

It has 24 blocks of 1024 channels, with random weights and latents. The forward pass runs in float16: with one
condition, replayed from a CUDA graph, and with both guidance branches. The training step is a forward and a backward
pass in bfloat16 autocast with fp32 parameters and recomputed blocks. Prints a table and writes it to
benchmarks/results/dit-*.md.
"""

import argparse
import datetime
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.structures import real_voxels, surface_voxels  # noqa: E402
from d3ds2.geometry.voxels import Voxels  # noqa: E402
from d3ds2.networks.image_encoder import ImageTokens  # noqa: E402
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig  # noqa: E402

PATCHES = 37  # per edge of the picture: 37² + 5 = 1374 tokens
V11 = {"compression_block": 8, "pooled_conv": False, "sparse_context": False}
V10 = {"compression_block": 4, "pooled_conv": True, "sparse_context": True}


def image_tokens(batch_size: int, foreground: float) -> ImageTokens:
    """Return tokens with random features; a share `foreground` of the patches is kept, in the middle rows."""
    places = torch.arange(PATCHES**2)
    kept = places[(places // PATCHES - PATCHES // 2).abs() <= foreground * PATCHES / 2]
    patches = torch.stack([kept % PATCHES, kept // PATCHES, torch.zeros_like(kept)], dim=1)
    xyz = torch.cat([torch.tensor([[0, 0, 1]]).expand(5, 3), patches]).int()
    coords = torch.cat([torch.nn.functional.pad(xyz, (1, 0), value=b) for b in range(batch_size)]).cuda()
    return ImageTokens(
        torch.randn(len(coords), 1024, device="cuda", dtype=torch.float16),
        coords,
        torch.ones(len(coords), dtype=torch.bool, device="cuda"),
        batch_size,
    )


def make_model(form: dict, top_k: int, dtype: torch.dtype) -> LatentDiT:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LatentDiT(LatentDiTConfig(top_k=top_k, **form))
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)  # zero layers cost the same time, but would hide errors
    return model.to(dtype)


def median_ms(function: Callable, runs: int = 7) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(runs + 2):
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def start_of_memory() -> int:
    """Return the bytes allocated before a case: the structures, and what earlier cases left behind."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_gib(start: int) -> float:
    return (torch.cuda.max_memory_allocated() - start) / 2**30


@torch.no_grad()
def time_forward(voxels: Voxels, form: dict, top_k: int) -> list[str]:
    """Return ms with one condition, from a CUDA graph and with both guidance branches, and GiB, weights included."""
    start = start_of_memory()
    model = make_model(form, top_k, torch.float16).eval()
    cells = []
    for copies in (1, 2):
        batch = voxels.repeat(copies)
        context = image_tokens(copies, 0.5 if form["sparse_context"] else 1.0)
        x, t = torch.randn(len(batch), 16, device="cuda").half(), torch.full((copies,), 0.5, device="cuda")
        cells.append(f"{median_ms(lambda: model(x, t, batch, context)):.1f}")  # noqa: B023
        if copies == 1:
            memory = peak_gib(start)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x, t, batch, context)
            cells.append(f"{median_ms(graph.replay):.1f}")
            del graph
    return [*cells, f"{memory:.2f}"]


def time_training(voxels: Voxels, form: dict, top_k: int) -> list[str]:
    """Return ms and peak GiB of a training step."""
    start = start_of_memory()
    model = make_model(form, top_k, torch.float32)
    model.gradient_checkpointing = True
    context = image_tokens(1, 0.5 if form["sparse_context"] else 1.0)
    x, t = torch.randn(len(voxels), 16, device="cuda"), torch.full((1,), 0.5, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x, t, voxels, context).float().square().mean()
        loss.backward()

    return [f"{median_ms(step, 3):.1f}", f"{peak_gib(start):.2f}"]


def write_table(out: Path, name: str, title: str, about: str, lines: list[list[str]]) -> None:
    """Write a table of cells to `<name>-<GPU>.md`, below its title, the date, the GPU, the versions and `about`."""
    device = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}-{device.split()[-1].lower()}.md").write_text(
        f"# {title}\n\n{datetime.date.today()}, {device}, {versions}. {about}\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parity", type=Path, default=ROOT.parent / "shared" / "parity", help="folder with the real structure"
    )
    parser.add_argument("--real", action="store_true", help="only the real structure and its coarsening")
    parser.add_argument("--forward", action="store_true", help="skip the training step")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()

    real, coarse = (real_voxels(arguments.parity, "cuda", factor) for factor in (1, 2))
    cases = [("real 1024³", real, 8), ("real, coarsened 2×", coarse, 32)]
    if not arguments.real:
        cases += [(f"surface {n}", surface_voxels(n, "cuda"), 8) for n in (10655, 45904, 131072)]
    header = ["structure", "tokens", "form", "forward ms", "CUDA graph ms", "both branches ms", "GiB", "step ms", "GiB"]
    lines = [header, ["---"] * len(header)]
    for name, voxels, top_k in cases:
        for label, form, k in (("m_cmp 8, k 8", V11, 8), (f"m_cmp 4, k {top_k}", V10, top_k)):
            timed = time_forward(voxels, form, k)
            step = ["", ""] if arguments.forward else time_training(voxels, form, k)
            lines.append([name, f"{len(voxels):,}", label, *timed, *step])
            print(" | ".join(lines[-1]), flush=True)
    write_table(arguments.out, "dit", "The latent DiT, 24 × 1024", "`python benchmarks/dit.py`.", lines)


if __name__ == "__main__":
    main()
