"""Time the geometry on a CPU: mesh -> SDF and SDF -> mesh.

    python benchmarks/geometry.py --corpus ../shared/data/meshes

The two meshes are scenes: meshes of the corpus, scattered by a fixed seed. Prints tables and writes them to
benchmarks/results/geometry-cpu.md.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import numba
import numpy as np
import skimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from d3ds2.meshes.mesh import decimate  # noqa: E402
from d3ds2.meshes.mesh_to_sdf import SparseSDF, mesh_to_sdf, normalize_mesh  # noqa: E402
from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh  # noqa: E402


def make_scene(corpus: Path, num_faces: int, parts: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Join about `parts` meshes of the corpus, scattered and scaled by the seed: vertices (V, 3), faces (F, 3)."""
    rng = np.random.default_rng(seed)
    share = num_faces / parts
    entries = [e for e in json.loads((corpus / "index.json").read_text()) if 0.3 * share < e["nfaces"] < 4 * share]
    vertices, faces, first, total = [], [], 0, 0
    for entry in rng.permutation(np.array(entries, object)):
        with np.load(corpus / entry["file"]) as file:
            place = (file["v"] / 65535 - 0.5) * rng.uniform(0.05, 0.2) + rng.uniform(-0.5, 0.5, 3)
            faces.append(file["f"].astype(np.int64) + first)
        vertices.append(place)
        first, total = first + len(place), total + len(faces[-1])
        if total >= num_faces:
            break
    return normalize_mesh(np.concatenate(vertices)), np.concatenate(faces)


def analytic_band(resolution: int, band: float, turns: int = 1) -> SparseSDF:
    """Return the band around the zero level of `ripple`, made block by block, at any resolution."""
    grid = resolution // 8
    offset = (np.arange(8) + 0.5) / resolution * 2
    coords, values = [], []
    for x in range(grid):
        corner = np.stack(np.meshgrid([x], np.arange(grid), np.arange(grid), indexing="ij"), -1).reshape(-1, 3)
        centre = (corner * 8 + 4) / resolution * 2 - 1
        near = np.abs(ripple(*centre.T, turns)) * resolution / 2 < band + 14
        corner = corner[near]
        p = corner[:, :, None] * 16 / resolution - 1 + offset  # (B, 3, 8)
        field = ripple(p[:, 0, :, None, None], p[:, 1, None, :, None], p[:, 2, None, None, :], turns)
        field = (field * (resolution / 2 / band)).clip(-1, 1).astype(np.float32)
        active = (np.abs(field) < 1).any((1, 2, 3))
        coords.append(corner[active])
        values.append(field[active])
    values = np.concatenate(values)
    return SparseSDF(np.concatenate(coords).astype(np.int32), values, np.zeros_like(values, bool), resolution, band)


def ripple(x: np.ndarray, y: np.ndarray, z: np.ndarray, turns: int) -> np.ndarray:
    """Return nearly the distance to a rippled ball of radius 0.8; with more turns, gyroid walls fill it.

    The coordinates in [-1,1]³ have any shapes that broadcast to that of the result.
    """
    ball = np.sqrt(x * x + y * y + z * z) - 0.8 + 0.02 * np.sin(9 * x) * np.sin(9 * y) * np.sin(9 * z)
    if turns == 1:
        return ball
    k = 3.0 * turns
    gyroid = np.sin(k * x) * np.cos(k * y) + np.sin(k * y) * np.cos(k * z) + np.sin(k * z) * np.cos(k * x)
    return np.maximum(ball, gyroid / (1.3 * k))


def timed(function, *arguments, **options):
    """Return the result, wall-clock seconds, and CPU seconds, which say more when other work shares the machine."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    return result, time.perf_counter() - start, time.process_time() - cpu_start


def dense_field(sdf: SparseSDF) -> np.ndarray:
    """Return the values on the whole grid (R, R, R), as skimage needs them, with +1 where there is no block."""
    field = np.ones((sdf.resolution,) * 3, np.float32)
    for (x, y, z), block in zip(sdf.block_coords * 8, sdf.values, strict=True):
        field[x : x + 8, y : y + 8, z : z + 8] = block
    return field


def peak() -> str:
    """Return the peak memory of this process so far, in GiB."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared/data/meshes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/geometry-cpu.md")
    arguments = parser.parse_args()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# Geometry on the CPU",
        "",
        f"{datetime.date.today()}, {cpu}, {cores} cores, load {os.getloadavg()[0]:.1f} at the start; Python "
        f"{platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}, skimage "
        f"{skimage.__version__}. `python benchmarks/geometry.py`; everything compiled beforehand. "
        'Seconds are wall-clock time; "of all cores" is the CPU time of all cores together, which says more when other '
        "work shares the machine. GiB: peak of the process so far.",
        "",
        "## mesh_to_sdf, band of 4 voxels",
        "",
        "| faces | resolution | active voxels, M | blocks | seconds | of all cores | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    sdf = mesh_to_sdf(*make_scene(arguments.corpus, 2000), 64)
    decimate(sdf_to_mesh(sdf.block_coords, sdf.values, 64, min_component=0.01), 1000)
    for num_faces in (20_000, 200_000):
        vertices, faces = make_scene(arguments.corpus, num_faces)
        for resolution in (256, 512, 1024):
            sdf, seconds, cpu_seconds = timed(mesh_to_sdf, vertices, faces, resolution, band=4.0)
            count = np.abs(sdf.values) < 1
            lines.append(f"| {len(faces):,} | {resolution} | {count.sum() / 1e6:.1f} | {len(count):,} "
                         f"| {seconds:.2f} | {cpu_seconds:.2f} | {peak()} |")  # fmt: skip
            print(lines[-1], flush=True)
            del sdf, count
    lines += [
        "",
        "## sdf_to_mesh, band of 4 voxels",
        "",
        '"Dropping small parts" and skimage (Lewiner, on the dense grid, up to 512) are CPU time of all cores, in '
        "seconds.",
        "",
        "| resolution | voxels, M | faces, M | seconds | of all cores | dropping small parts | skimage, dense | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for resolution, turns in ((256, 1), (512, 1), (1024, 1), (1024, 4)):
        sdf = analytic_band(resolution, 4.0, turns)
        voxels = (np.abs(sdf.values) < 1).sum() / 1e6
        mesh, seconds, cpu_seconds = timed(sdf_to_mesh, sdf.block_coords, sdf.values, resolution)
        _, _, with_parts = timed(sdf_to_mesh, sdf.block_coords, sdf.values, resolution, min_component=0.01)
        memory, dense, dropping = peak(), "-", max(with_parts - cpu_seconds, 0.0)
        if resolution <= 512:
            dense = f"{timed(skimage.measure.marching_cubes, dense_field(sdf), 0.0)[2]:.2f}"
        lines.append(f"| {resolution} | {voxels:.1f} | {len(mesh.faces) / 1e6:.2f} | {seconds:.2f} "
                     f"| {cpu_seconds:.2f} | +{dropping:.2f} | {dense} | {memory} |")  # fmt: skip
        print(lines[-1], flush=True)
        if (resolution, turns) == (1024, 1):
            small, _, seconds = timed(decimate, mesh, 500_000)
            note = f"decimate {len(mesh.faces) / 1e6:.2f} M to {len(small.faces):,} faces: {seconds:.1f} s of one core"
    lines += ["", note, ""]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines))
    print(note)


if __name__ == "__main__":
    main()
