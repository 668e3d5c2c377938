"""The whole official path on a GPU: seconds and peak memory of every stage, with and without a cap on memory.

    python benchmarks/pipeline.py --parity ../shared/parity --version v1.1 --caps 0 8 4
    python benchmarks/pipeline.py --meshing --device cpu

The architecture of the released weights with random values, in half precision, brought to the device stage by stage.
Token counts are real: the structure of the 1024³ stage is `latent_index_official` (84,820 tokens), that of the 512³
stage its coarsening. Random weights decode to noise, so what is meshed is a smooth solid of the structure's shape, on
the decoded blocks. "public" columns are what the public implementation states or was measured at (design.md, issue 5).

`--meshing` times marching cubes alone, at several numbers of active voxels, beside skimage on the dense grid.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.structures import real_voxels  # noqa: E402
from d3ds2.checkpoint import FineSamplingConfig, SamplingConfig  # noqa: E402
from d3ds2.device_meshing import device_mesh  # noqa: E402
from d3ds2.generation_error import EmptyResultError  # noqa: E402
from d3ds2.image_encoder import ImageEncoder, ImageEncoderConfig  # noqa: E402
from d3ds2.latent_dit import LatentDiT, LatentDiTConfig  # noqa: E402
from d3ds2.offload import on_device  # noqa: E402
from d3ds2.pipeline import Pipeline  # noqa: E402
from d3ds2.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig  # noqa: E402
from d3ds2.sdf_blocks import SDFBlocks  # noqa: E402
from d3ds2.sdf_to_mesh import DECODED, sdf_to_mesh  # noqa: E402
from d3ds2.sdf_vae import SDFVAE, SDFVAEConfig  # noqa: E402
from d3ds2.structure_dit import StructureDiT, StructureDiTConfig  # noqa: E402
from d3ds2.structure_vae import StructureVAE, StructureVAEConfig  # noqa: E402
from d3ds2.voxels import Voxels  # noqa: E402

GIB = 2**30
LEVEL = 0.2
PUBLIC_DIT = {"v1.0": (0.573, 1.361), "v1.1": (0.194, 0.785)}  # seconds of a forward pass, 16,008 and 84,820 tokens
PUBLIC = {"fine sdf": 0.5, "mesh": 3.9}  # seconds


def make_pipeline(version: str, dtype: torch.dtype, device: str, budget: int | None) -> Pipeline:
    """The networks of a release with random weights, kept in the computer's memory."""
    if version == "v1.0":
        coarse = LatentDiTConfig(top_k=32)
        fine = LatentDiTConfig(top_k=8, position_factor=0.5)
    else:
        coarse = LatentDiTConfig(compression_block=8, pooled_conv=False, sparse_context=False)
        fine = replace(coarse, position_factor=0.5)
    parts = {
        "image_encoder": lambda: ImageEncoder(ImageEncoderConfig()),
        "structure_vae": lambda: StructureVAE(StructureVAEConfig()),
        "structure_dit": lambda: StructureDiT(StructureDiTConfig()),
        "latent_dit": lambda: LatentDiT(coarse),
        "sdf_vae": lambda: SDFVAE(SDFVAEConfig()),
        "fine_latent_dit": lambda: LatentDiT(fine),
        "fine_sdf_vae": lambda: SDFVAE(SDFVAEConfig(position_resolution=1024)),
        "refiner": lambda: Refiner(RefinerConfig()),
        "fine_refiner": lambda: SignRefiner(SignRefinerConfig()),
    }
    networks = {}
    for name, make in parts.items():
        with torch.device(device):
            network = make()
        networks[name] = network.to("cpu", dtype).eval().requires_grad_(False)
    sampling = SamplingConfig(sdf_resolution=512, level=LEVEL, fine=FineSamplingConfig())
    return Pipeline(**networks, sampling=sampling, device=device, memory_budget=budget)


def solid_values(voxels: Voxels) -> SDFBlocks:
    """Distances of a smooth solid, with the structure (one sample) as its surface, on the structure's blocks."""
    G = voxels.resolution
    occupied = np.zeros((G, G, G), bool)
    occupied[tuple(voxels.coords[:, 1:].long().cpu().numpy().T)] = True
    filled = ndimage.gaussian_filter(ndimage.binary_fill_holes(occupied).astype(np.float32), 0.7)
    field = torch.from_numpy(2 * (0.5 - filled))[None, None].to(voxels.device)  # (1, 1, G, G, G), negative inside
    order = ((voxels.coords[:, 1].long() * G + voxels.coords[:, 2]) * G + voxels.coords[:, 3]).argsort()
    coords = voxels.coords[order]
    place = (torch.arange(8, device=voxels.device) + 0.5) / 8 - 0.5
    place = torch.cartesian_prod(place, place, place)  # (512, 3)
    values = []
    for some in coords[:, 1:].split(4096):
        points = (some[:, None] + place + 0.5) / G * 2 - 1
        points = points.flip(-1)[None, None]  # grid_sample reads z, y, x
        values.append(torch.nn.functional.grid_sample(field, points, align_corners=False)[0, 0, 0])
    return SDFBlocks(coords, torch.cat(values).view(-1, 8, 8, 8).clamp(-1, 1), 8 * G, 1)


class Stopwatch:
    """Seconds and peak gigabytes of the stages of one run."""

    def __init__(self, device: str):
        self.device, self.rows = device, []

    def __call__(self, name: str, function, *arguments, calls: int = 1, **options):
        """Run a stage; `calls` is how many network passes it made, told in the row."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function(*arguments, **options)
        torch.cuda.synchronize()
        row = {"stage": name, "seconds": time.perf_counter() - start, "passes": calls}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        self.rows.append(row)
        print(
            f"  {name:16} {row['seconds']:8.2f} s {row['peak_gib']:7.2f} GiB, reserved {row['reserved_gib']:.2f}",
            flush=True,
        )
        return result


def run_path(pipeline: Pipeline, parity: Path, steps: tuple[int, int, int], refine: bool) -> list[dict]:
    """All stages; structures and what is meshed are given, everything else is computed."""
    watch, device = Stopwatch(pipeline.device), pipeline.device
    structure_steps, latent_steps, fine_steps = steps
    pixels = torch.rand(1, 4, 518, 518)
    pixels[:, 3] = 0
    pixels[:, 3, 100:400, 120:380] = 1
    encoder = pipeline.image_encoder

    def encode():
        with torch.no_grad(), on_device(encoder, device):
            return encoder(pixels.to(device, next(encoder.parameters()).dtype))

    tokens = watch("image", encode)
    watch("structure", sample_anything, pipeline, tokens, structure_steps, calls=structure_steps)
    real = {"": real_voxels(parity, device, 2), "fine ": real_voxels(parity, device)}
    meshes = None
    for prefix, count in (("", latent_steps), ("fine ", fine_steps)):
        voxels = Voxels.sort(real[prefix].coords, real[prefix].resolution, 1)[0]  # nothing cached yet
        if prefix:
            watch("fine structure", pipeline.structure_of, meshes)
        latents = watch(f"{prefix}latents", pipeline.sample_latents, voxels, tokens, [0], count, calls=count)
        latents = latents.nan_to_num()
        voxels = Voxels.sort(voxels.coords, voxels.resolution, 1)[0]
        if refine:
            watch(f"{prefix}refined sdf", pipeline.decode_surface, latents, voxels, True)
        watch(f"{prefix}sdf", pipeline.decode_blocks, latents, voxels)
        solid = solid_values(voxels)
        meshes = watch(f"{prefix}mesh", pipeline.blocks_to_meshes, solid)
        print(
            f"    {len(voxels)} tokens, {len(voxels) * 512 / 1e6:.1f} M voxels, {len(meshes[0].faces)} faces",
            flush=True,
        )
        del latents, solid
    return watch.rows


def sample_anything(pipeline: Pipeline, tokens, steps: int) -> Voxels | None:
    """The structure stage; random weights may leave it empty."""
    try:
        return pipeline.sample_structure(tokens, [0], steps)
    except EmptyResultError:
        return None


def ball_blocks(resolution: int) -> tuple[np.ndarray, Tensor]:
    """Blocks within four voxels of a rippled ball, and their distances over the band."""
    G, centre, radius = resolution // 8, resolution / 2, 0.42 * resolution

    def distance(x, y, z):
        x, y, z = ((a + 0.5 - centre) / radius for a in (x, y, z))
        ripple = 0.1 * np.sin(5 * x) * np.sin(5 * y + 1) * np.sin(5 * z + 2)
        return ((x * x + y * y + z * z) ** 0.5 - 1 - ripple) * radius

    middle = np.arange(G) * 8 + 3.5
    near = np.abs(distance(middle[:, None, None], middle[:, None], middle)) < 4 + 6.1
    coords = np.argwhere(near)
    values = np.empty((len(coords), 8, 8, 8), np.float32)
    for first in range(0, len(coords), 8192):
        corner = coords[first : first + 8192, :, None] * 8 + np.arange(8)  # (n, 3, 8)
        x, y, z = corner[:, 0, :, None, None], corner[:, 1, None, :, None], corner[:, 2, None, None, :]
        values[first : first + 8192] = np.clip(distance(x, y, z) / 4, -1, 1)
    return coords, values


def time_device_meshing(coords: Tensor, values: Tensor, resolution: int) -> dict[str, float]:
    """The same on the GPU: the best of three, with the mesh on the CPU at the end."""
    seconds = []
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        start = time.perf_counter()
        device_mesh(coords, values, resolution, **DECODED)
        seconds.append(time.perf_counter() - start)
    return {"gpu_seconds": min(seconds), "gpu_gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def time_meshing(resolutions: list[int], threads: int | None) -> list[dict]:
    """Marching cubes alone, with the flood fill and the dropping of small parts, and skimage's."""
    from skimage.measure import marching_cubes

    rows = []
    sdf_to_mesh(*ball_blocks(64), 64, **DECODED)  # compile
    for resolution in resolutions:
        coords, values = ball_blocks(resolution)
        seconds = []
        for _ in range(3):
            start, cpu = time.perf_counter(), time.process_time()
            mesh = sdf_to_mesh(coords, values, resolution, threads=threads, **DECODED)
            seconds.append((time.perf_counter() - start, time.process_time() - cpu))
        row = {"resolution": resolution, "voxels_m": values.size / 1e6, "faces": len(mesh.faces)}
        row |= {"seconds": min(s for s, _ in seconds), "cpu_seconds": min(c for _, c in seconds), "skimage": None}
        if torch.cuda.is_available():
            row |= time_device_meshing(torch.from_numpy(coords).cuda(), torch.from_numpy(values).cuda(), resolution)
        if resolution <= 640:
            dense = np.ones((resolution,) * 3, np.float32)
            G = resolution // 8
            dense.reshape(G, 8, G, 8, G, 8).transpose(0, 2, 4, 1, 3, 5)[tuple(coords.T)] = values
            start = time.perf_counter()
            marching_cubes(dense, 0.0)
            row["skimage"] = time.perf_counter() - start
            del dense
        row["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(row)
        print(" ", json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", type=Path, default=Path("../shared/parity"), help="folder of latent_index_official")
    parser.add_argument("--version", choices=("v1.0", "v1.1"), default="v1.1")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--caps", type=float, nargs="+", default=[0.0], help="GiB that the process may take; 0: all")
    parser.add_argument("--steps", type=int, nargs=3, default=(50, 30, 15), help="structure, latents, fine latents")
    parser.add_argument("--refine", action="store_true", help="run the refiners too")
    parser.add_argument("--meshing", action="store_true", help="time marching cubes alone, nothing else")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[128, 320, 608, 1024], help="of --meshing")
    parser.add_argument("--threads", type=int, help="of --meshing; default: all cores")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    results = {}
    if arguments.meshing:
        results["meshing"] = time_meshing(arguments.resolutions, arguments.threads)
    else:
        dtype, device = getattr(torch, arguments.dtype), "cuda"
        total = torch.cuda.get_device_properties(0).total_memory
        print(f"{torch.cuda.get_device_name(0)}, {arguments.version}, {arguments.dtype}, public DiT s a pass:",
              PUBLIC_DIT[arguments.version], "other public stages:", PUBLIC)  # fmt: skip
        pipeline = make_pipeline(arguments.version, dtype, device, None)
        for cap in arguments.caps:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)
            pipeline.memory_budget = int(max(cap - 1.5, 1.0) * GIB) if cap else None
            for attempt in ("first", "warm") if cap == arguments.caps[0] else ("warm",):
                print(f"cap {cap:g} GiB, {attempt}:", flush=True)
                steps = (2, 2, 2) if attempt == "first" else tuple(arguments.steps)
                try:
                    rows = run_path(pipeline, arguments.parity, steps, arguments.refine)
                except torch.OutOfMemoryError as error:
                    print("  out of memory:", str(error).split(". ")[0], flush=True)
                    rows = [{"stage": "out of memory"}]
                results[f"{arguments.version} cap {cap:g} {attempt}"] = rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
