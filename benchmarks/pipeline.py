"""Time the whole official path on a GPU: seconds and peak memory of each stage, with and without a cap on memory.

    python benchmarks/pipeline.py --parity ../shared/parity --version v1.1 --caps 0 8 4 --json numbers.json
    python benchmarks/pipeline.py --meshing
    python benchmarks/pipeline.py --small --device cpu --refine-caps 0  # with small networks, to see that it runs

The networks have the released architecture and random weights, in half precision. Each is moved to the device for its
stage. Token counts are real: the structure of the 1024³ stage is `latent_index_official` (84,820 tokens), and that of
the 512³ stage is its coarsening. Random weights decode to noise, so the mesh is made from a smooth solid of the
structure's shape, on the decoded blocks. "public" is what the public implementation states, or what it was measured at.

The file of numbers is written after every stage. Under a cap the stages run `--cap-steps` steps, enough to see whether
they fit and how long a pass takes. `--meshing` times marching cubes alone, at several numbers of active voxels, beside
skimage on the dense grid.
"""

import argparse
import datetime
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.structures import real_voxels  # noqa: E402
from d3ds2.generation_error import EmptyResultError  # noqa: E402
from d3ds2.geometry.sdf_blocks import SDFBlocks  # noqa: E402
from d3ds2.geometry.voxels import Voxels  # noqa: E402
from d3ds2.meshes.sdf_to_mesh import DECODED_OPTIONS, sdf_to_mesh  # noqa: E402
from d3ds2.meshes.sdf_to_mesh_gpu import device_mesh  # noqa: E402
from d3ds2.networks.chunked_decode import MemoryBudgetError  # noqa: E402
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig  # noqa: E402
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig  # noqa: E402
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig  # noqa: E402
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig  # noqa: E402
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig  # noqa: E402
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig  # noqa: E402
from d3ds2.offload import on_device  # noqa: E402
from d3ds2.pipeline import Pipeline, build_pipeline  # noqa: E402
from d3ds2.storage.model_folder import FineSamplingConfig, SamplingConfig  # noqa: E402

START = time.perf_counter()
GIB = 2**30
LEVEL = 0.2
PUBLIC = {  # seconds; for latents, of one pass over 16,008 and 84,820 tokens
    "v1.0": {"latents": 0.573, "fine latents": 1.361, "fine sdf": 0.5, "mesh": 3.9},
    "v1.1": {"latents": 0.194, "fine latents": 0.785, "fine sdf": 0.5, "mesh": 3.9},
}
BUDGETS = (0.5, 1.0, 2.0, 4.0)  # GiB for decoding the fine latents
SMALL = {  # keyword arguments that make each network small
    "image_encoder": {"image_size": 56, "hidden_size": 64, "depth": 1, "num_heads": 2},
    "structure_vae": {"encoder_widths": (8, 8, 16), "decoder_widths": (16, 8, 8)},
    "structure_dit": {"resolution": 2, "hidden_size": 32, "depth": 2, "num_heads": 2, "context_size": 64},
    "latent_dit": {"hidden_size": 64, "depth": 2, "num_heads": 32, "context_size": 64},
    "sdf_vae": {"hidden_size": 64, "num_heads": 2, "group_norm_groups": 4},
    "refiner": {"widths": (8, 8, 16), "patch_size": 24, "feature_channels": 4},
    "fine_refiner": {"widths": (8, 8, 16), "patch_size": 32},
}
SMALL_FACTOR = 8  # by which the resolutions are divided


def make_pipeline(version: str, dtype: torch.dtype, device: str, small: bool) -> Pipeline:
    """Return a pipeline with a release's networks and random weights, which stay in main memory between stages."""
    sizes = SMALL if small else {network: {} for network in SMALL}
    if version == "v1.0":
        coarse = LatentDiTConfig(top_k=32, **sizes["latent_dit"])
        fine = replace(coarse, top_k=8, position_factor=0.5)
    else:
        coarse = LatentDiTConfig(compression_block=8, pooled_conv=False, sparse_context=False, **sizes["latent_dit"])
        fine = replace(coarse, position_factor=0.5)
    resolution = 512 // SMALL_FACTOR if small else 512
    sdf_vae = SDFVAEConfig(position_resolution=resolution, **sizes["sdf_vae"])
    parts = {
        "image_encoder": lambda: ImageEncoder(ImageEncoderConfig(**sizes["image_encoder"])),
        "structure_vae": lambda: StructureVAE(StructureVAEConfig(**sizes["structure_vae"])),
        "structure_dit": lambda: StructureDiT(StructureDiTConfig(**sizes["structure_dit"])),
        "latent_dit": lambda: LatentDiT(coarse),
        "sdf_vae": lambda: SDFVAE(sdf_vae),
        "fine_latent_dit": lambda: LatentDiT(fine),
        "fine_sdf_vae": lambda: SDFVAE(replace(sdf_vae, position_resolution=2 * resolution)),
        "refiner": lambda: Refiner(RefinerConfig(**sizes["refiner"])),
        "fine_refiner": lambda: SignRefiner(SignRefinerConfig(**sizes["fine_refiner"])),
    }
    networks = {}
    for name, make in parts.items():
        with torch.device(device):
            network = make()
            for module in network.modules():
                if isinstance(module, nn.Linear) and not module.weight.any():
                    nn.init.normal_(module.weight, std=0.02)  # with zeros it would run faster, on less power
        networks[name] = network.to("cpu", dtype).eval().requires_grad_(False)
    fine_sampling = FineSamplingConfig(sdf_resolution=2 * resolution)
    sampling = SamplingConfig(sdf_resolution=resolution, level=LEVEL, fine=fine_sampling)
    return build_pipeline(networks, sampling, device)


def solid_values(voxels: Voxels) -> SDFBlocks:
    """Return distances to a smooth solid whose surface is the structure (one sample), on the structure's blocks."""
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
    """Record the seconds and peak GiB of each stage of a run in `rows`; call `on_row` after each stage."""

    def __init__(self, device: str, public: dict[str, float], rows: list[dict], on_row: Callable[[], None]):
        self.device, self.public, self.rows, self.on_row = device, public, rows, on_row

    def __call__(self, name: str, function: Callable, *arguments, passes: int = 0, **options):
        """Run a stage and return its result; `passes` counts its network passes, one per step and guidance branch."""
        is_gpu, row = self.device == "cuda", {"stage": name}
        if is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function(*arguments, **options)
        if is_gpu:
            torch.cuda.synchronize()
        row |= {"seconds": time.perf_counter() - start, "from": start - START}
        if is_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if passes:
            row["passes"], row["pass_seconds"] = passes, row["seconds"] / passes
        if name in self.public:
            row["public"] = self.public[name]
        self.rows.append(row)
        numbers = "  ".join(
            f"{key} {value:.3g}" for key, value in row.items() if key not in ("stage", "from", "passes")
        )
        print(f"  {name:20} {numbers}", flush=True)
        self.on_row()
        return result


def run_path(
    pipeline: Pipeline,
    structures: dict[str, Voxels],
    steps: tuple[int, int, int],
    refine: bool,
    budgets: Sequence[float],
    watch: Stopwatch,
) -> None:
    """Run all stages; the structures and the solid to mesh are given, everything else is computed."""
    device, encoder = pipeline.device, pipeline.image_encoder
    structure_steps, latent_steps, fine_steps = steps
    size = encoder.config.image_size
    pixels = torch.rand(1, 4, size, size)
    pixels[:, 3] = 0
    pixels[:, 3, size // 5 : size * 4 // 5, size // 4 : size * 3 // 4] = 1

    def encode():
        with torch.no_grad(), on_device(encoder, device):
            return encoder(pixels.to(device, next(encoder.parameters()).dtype))

    tokens = watch("image", encode)
    watch("structure", sample_anything, pipeline, tokens, structure_steps, passes=2 * structure_steps)
    meshes = None
    for prefix, count in (("", latent_steps), ("fine ", fine_steps)):
        real = structures[prefix]
        if prefix:
            watch("fine structure", pipeline.structure_of, meshes)
        voxels = Voxels(real.coords, real.resolution, 1)  # without cached tables
        latents = watch(f"{prefix}latents", pipeline.sample_latents, voxels, tokens, [0], count, passes=2 * count)
        latents = latents.nan_to_num().clamp(-3, 3)  # random networks may return any number
        if refine:
            voxels = Voxels(real.coords, real.resolution, 1)
            watch(f"{prefix}refined sdf", pipeline.decode_surface, latents, voxels, True)
        voxels = Voxels(real.coords, real.resolution, 1)
        watch(f"{prefix}sdf", pipeline.decode_blocks, latents, voxels)
        for budget in budgets if prefix else ():
            voxels = Voxels(real.coords, real.resolution, 1)
            watch(f"fine sdf in {budget:g} GiB", pipeline.decode_blocks, latents, voxels, int(budget * GIB))
        del latents
        solid = solid_values(real)
        meshes = watch(f"{prefix}mesh", pipeline.blocks_to_meshes, solid)
        print(f"    {len(real)} tokens, {len(real) * 512 / 1e6:.1f} M voxels, {len(meshes[0].faces)} faces", flush=True)
        del solid


def sample_anything(pipeline: Pipeline, tokens, steps: int) -> Voxels | None:
    """Run the structure stage; random weights may give an empty structure."""
    try:
        return pipeline.sample_structure(tokens, [0], steps)
    except EmptyResultError:
        return None


def time_path(arguments: argparse.Namespace, results: dict, save: Callable[[], None]) -> None:
    """Time the path without a cap and under each cap, after a warm-up run that compiles, with two steps per stage."""
    device, version = arguments.device, arguments.version
    structures = {
        prefix: real_voxels(arguments.parity, device, factor * (SMALL_FACTOR if arguments.small else 1))
        for prefix, factor in (("", 2), ("fine ", 1))
    }
    start = time.perf_counter()
    pipeline = make_pipeline(version, getattr(torch, arguments.dtype), device, arguments.small)
    print(f"{version}, {arguments.dtype}; networks made in {time.perf_counter() - start:.1f} s", flush=True)
    runs = [("warm-up", 0.0, (2, 2, 2), False)]
    for cap in arguments.caps:
        name, steps = (f"cap {cap:g} GiB", arguments.cap_steps) if cap else ("no cap", arguments.steps)
        runs.append((name, cap, steps, False))
    for cap in arguments.refine_caps:
        runs.append((f"refiners, cap {cap:g} GiB" if cap else "refiners, no cap", cap, (1, 1, 1), True))
    for name, cap, steps, refine in runs:
        if device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)
        rows = results[f"{version} {name}"] = []
        print(f"{name}, steps {steps}", flush=True)
        watch = Stopwatch(device, PUBLIC[version], rows, save)
        try:
            run_path(pipeline, structures, steps, refine, () if cap or refine else arguments.budgets, watch)
        except (torch.OutOfMemoryError, MemoryBudgetError) as error:
            rows.append({"stage": "out of memory", "message": str(error).split(". ")[0]})
            print("  out of memory:", rows[-1]["message"], flush=True)
            save()


def ball_blocks(resolution: int) -> tuple[np.ndarray, Tensor]:
    """Return the blocks (M, 3) near a rippled ball, and their distances over a band of four voxels, (M, 8, 8, 8)."""
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
    """Time meshing on the GPU, until the mesh is on the CPU: the best of three runs, in seconds and GiB.

    Takes block coordinates (M, 3) and values (M, 8, 8, 8).
    """
    seconds = []
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        start = time.perf_counter()
        device_mesh(coords, values, resolution, **DECODED_OPTIONS)
        seconds.append(time.perf_counter() - start)
    return {"gpu_seconds": min(seconds), "gpu_gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def time_meshing(arguments: argparse.Namespace, results: dict, save: Callable[[], None]) -> None:
    """Time marching cubes alone, with flood fill, gap closing and dropping of small parts; and skimage's."""
    rows = results["meshing"] = []
    sdf_to_mesh(*ball_blocks(64), 64, **DECODED_OPTIONS)  # compile
    if arguments.device == "cuda":
        time_device_meshing(*(torch.from_numpy(x).cuda() for x in ball_blocks(64)), 64)  # and load
    for resolution in arguments.resolutions:
        coords, values = ball_blocks(resolution)
        row = {"resolution": resolution, "voxels_m": values.size / 1e6}
        rows.append(row)
        if arguments.device == "cuda":
            row |= time_device_meshing(torch.from_numpy(coords).cuda(), torch.from_numpy(values).cuda(), resolution)
            save()
        seconds = []
        for _ in range(3):
            start, cpu = time.perf_counter(), time.process_time()
            mesh = sdf_to_mesh(coords, values, resolution, threads=arguments.threads, **DECODED_OPTIONS)
            seconds.append((time.perf_counter() - start, time.process_time() - cpu))
        row |= {"faces": len(mesh.faces), "threads": arguments.threads}
        row |= {"seconds": min(s for s, _ in seconds), "cpu_seconds": min(c for _, c in seconds)}
        if resolution <= arguments.skimage_up_to:
            row["skimage"] = time_skimage(coords, values, resolution)
        row["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(" ", json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        save()


def time_skimage(coords: np.ndarray, values: np.ndarray, resolution: int) -> float:
    """Return the seconds of Lewiner's marching cubes on the dense grid of blocks (M, 3) with values (M, 8, 8, 8)."""
    from skimage.measure import marching_cubes

    dense, G = np.ones((resolution,) * 3, np.float32), resolution // 8
    dense.reshape(G, 8, G, 8, G, 8).transpose(0, 2, 4, 1, 3, 5)[tuple(coords.T)] = values
    start = time.perf_counter()
    marching_cubes(dense, 0.0)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parity", type=Path, default=ROOT.parent / "shared" / "parity", help="folder with latent_index_official"
    )
    parser.add_argument("--version", choices=("v1.0", "v1.1"), default="v1.1")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="use small networks and an eighth of the resolutions")
    parser.add_argument("--caps", type=float, nargs="*", default=[0.0], help="GiB that the process may use; 0: all")
    parser.add_argument("--steps", type=int, nargs=3, default=(50, 30, 15), help="structure, latents, fine latents")
    parser.add_argument("--cap-steps", type=int, nargs=3, default=(4, 4, 2), help="the same under a cap")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="GiB to decode the fine latents in")
    parser.add_argument("--refine-caps", type=float, nargs="*", default=[], help="caps under which refiners run too")
    parser.add_argument("--meshing", action="store_true", help="time marching cubes only")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[152, 368, 632, 664, 1024], help="for --meshing")
    parser.add_argument("--skimage-up-to", type=int, default=664, help="largest resolution at which skimage runs")
    parser.add_argument("--threads", type=int, help="for --meshing; default: all cores")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(arguments)
    results = {"date": str(datetime.date.today()), "torch": torch.__version__}
    if arguments.device == "cuda":
        results["device"] = torch.cuda.get_device_name()
    print(results, flush=True)

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))

    (time_meshing if arguments.meshing else time_path)(arguments, results, save)


if __name__ == "__main__":
    main()
