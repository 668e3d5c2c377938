"""Spatial sparse attention without Triton on a CPU: beside dense attention, a latent step of a mug, a whole picture.

    python benchmarks/cpu.py

An attention layer of the latent DiT (projections, compression, three branches, gates) is timed in turn with a dense
one: the same projections around torch's scaled_dot_product_attention over all tokens, its keys and values repeated to
all heads beforehand. Prints tables, and writes benchmarks/results/cpu.md.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.structures import surface_voxels  # noqa: E402
from d3ds2.geometry.voxels import Voxels  # noqa: E402
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention  # noqa: E402
from d3ds2.meshes.mesh_to_structure import mesh_to_structure  # noqa: E402
from d3ds2.networks.image_encoder import ImageTokens  # noqa: E402
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig  # noqa: E402
from d3ds2.pipeline import load_pipeline  # noqa: E402

TOKENS = (1024, 4096, 8192, 16384)
IMAGE_TOKENS = 170  # what the mug covers of the picture
ROUNDS = 4
PICTURE = ROOT / "workflows" / "demo_input.png"


def main() -> None:
    torch.manual_seed(0)
    pipeline = load_pipeline()
    released = LatentDiTConfig(compression_block=8, pooled_conv=False)
    lines = [header(), "", *attention_table("tiny", pipeline.stages[0].latent_dit.config)]
    lines += ["", *attention_table("released v1.1", released)]
    lines += ["", *step_lines(pipeline.stages[0].latent_dit), "", *picture_lines()]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "cpu.md").write_text(text)


def header() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    load = os.getloadavg()[0]
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    return (
        "# Spatial sparse attention without Triton, on a CPU\n\n"
        f"{datetime.date.today()}, {model}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, load before "
        f"{load:.1f}, OMP_WAIT_POLICY {policy}. torch {torch.__version__}, float32. `python benchmarks/cpu.py`.\n"
        f"The best of {ROUNDS} rounds, in which what is compared runs in turn. Cores: processor time over clock time."
    )


def best_of(*functions: Callable[[], object], rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """Best seconds by the clock of each function, and how many cores it kept busy then; they run in turn."""
    best = [(float("inf"), 0.0)] * len(functions)
    for function in functions:
        function()
    for _ in range(rounds):
        for i, function in enumerate(functions):
            clock, processor = time.perf_counter(), time.process_time()
            function()
            seconds = time.perf_counter() - clock
            best[i] = min(best[i], (seconds, (time.process_time() - processor) / seconds))
    return best


@torch.no_grad()
def attention_table(name: str, config: LatentDiTConfig) -> list[str]:
    """A row for each number of tokens: the sparse layer beside the dense one."""
    C, H, Hk = config.hidden_size, config.num_heads, config.num_kv_heads
    layer = SpatialSparseAttention(C, H, Hk, config.compression_block, config.pooled_conv, config.top_k)
    lines = [
        f"One attention layer of `{name}`: {H} heads of {C // H} channels, {Hk} of keys, top-{config.top_k}.",
        "",
        "| tokens | blocks | sparse, ms | cores | dense, ms | cores | sparse / dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in TOKENS:
        voxels, x = surface_voxels(count, "cpu"), torch.randn(count, C)
        (sparse, cores), (dense, dense_cores) = best_of(lambda: layer(x, voxels), lambda: dense_layer(layer, x))  # noqa: B023
        lines.append(
            f"| {count} | {voxels.block_counts[0]} | {sparse * 1e3:.1f} | {cores:.1f} | {dense * 1e3:.1f} "
            f"| {dense_cores:.1f} | {sparse / dense:.2f} |"
        )
    return lines


def dense_layer(layer: SpatialSparseAttention, x: Tensor) -> Tensor:
    """The projections of a layer around attention to all tokens: (N, C) -> (N, C)."""
    H, D = layer.num_heads, layer.head_dim
    q, k, v = (linear(x).unflatten(-1, (-1, D)) for linear in (layer.to_q, layer.to_k, layer.to_v))
    k, v = (rows.repeat_interleave(H // layer.num_kv_heads, dim=1) for rows in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*(rows.transpose(0, 1)[None] for rows in (q, k, v)))
    return layer.to_out(out[0].transpose(0, 1).flatten(1))


@torch.no_grad()
def step_lines(dit: LatentDiT) -> list[str]:
    """The time of a latent step of the mug."""
    voxels = mug()
    rows = torch.arange(IMAGE_TOKENS, dtype=torch.int32)
    coords = torch.stack([rows * 0, rows % 16, rows // 16, rows * 0], dim=1)
    features = torch.randn(IMAGE_TOKENS, dit.config.context_size)
    tokens = ImageTokens(features, coords, torch.ones(IMAGE_TOKENS, dtype=torch.bool), 1)
    x_t, t = torch.randn(len(voxels), dit.config.latent_channels), torch.tensor([0.7])
    ((seconds, cores),) = best_of(lambda: dit(x_t, t, voxels, tokens))
    return [
        f"A latent step of `tiny` for a mug of {len(voxels)} tokens in {voxels.block_counts[0]} blocks: "
        f"{seconds:.2f} s, {cores:.1f} cores."
    ]


def picture_lines() -> list[str]:
    """The time of the command line from its start to the mesh."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "d3ds2", str(PICTURE), "-o", f"{folder}/mesh.glb", "--device", "cpu"]
        for _ in range(2):  # the first run leaves compiled code behind
            start, before = time.perf_counter(), os.times()
            subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return [f"`python -m d3ds2 {PICTURE.name}`, from start to mesh: {seconds:.1f} s, {processor / seconds:.1f} cores."]


def mug() -> Voxels:
    """The structure of a mug with a handle: two walls, a bottom and half a ring."""
    around, along = np.meshgrid(np.linspace(0, 2 * np.pi, 97), np.linspace(0, 1, 33), indexing="ij")
    sheets = [(radius * np.cos(around), 0.7 * (2 * along - 1), radius * np.sin(around)) for radius in (0.55, 0.49)]
    sheets.append((0.55 * along * np.cos(around), 0 * along - 0.7, 0.55 * along * np.sin(around)))
    ring, arm = np.pi * (along - 0.5), 0.34 + 0.07 * np.cos(around)
    sheets.append((0.55 + arm * np.cos(ring), arm * np.sin(ring), 0.07 * np.sin(around)))
    vertices = np.concatenate([np.stack(sheet, axis=-1).reshape(-1, 3) for sheet in sheets]) - (0.2, 0, 0)
    corner = np.arange(97 * 33).reshape(97, 33)
    a, b, c, d = (part.ravel() for part in (corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]))
    faces = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    faces = np.concatenate([faces + i * corner.size for i in range(len(sheets))])
    blocks = torch.from_numpy(mesh_to_structure(vertices, faces, 256))
    return Voxels.sort(torch.nn.functional.pad(blocks, (1, 0)), 32, 1)[0]


if __name__ == "__main__":
    main()
