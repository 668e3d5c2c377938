"""Meshes -> sparse SDF: one file per shape and resolution, as data for all further training.

    python -m training.prepare_shapes training/configs/tiny_shapes.toml meshes=my_meshes data_dir=data/mine

Reads a folder of meshes (.npz corpus with index.json, or .glb .obj .ply .stl ..., Y up, front toward +Z), scales
each to 0.95 of the cube and writes

    data_dir/shapes/<R>/<name>.safetensors   block_coords (M,3) int16, sdf (M,8,8,8) fp16, sharp (M,64) packed bits
    data_dir/index.json                      name, source, split, num_tokens per resolution
    data_dir/failures.jsonl                  meshes that could not be read or converted, and why

Existing files are kept, so a stopped run continues where it was. One process per core.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh
from d3ds2.storage.atomic_file import replacing
from training.config import load_config
from training.data.meshes import MeshEntry, list_meshes, read_mesh
from training.data.shape_files import save_shape, shape_path


@dataclass(frozen=True)
class PrepareShapesConfig:
    meshes: str = "meshes"
    data_dir: str = "data"
    resolutions: tuple[int, ...] = (256,)
    bands: dict[str, float] | None = None  # in voxels, by resolution: {"256" = 2}; None: the paper's, see mesh_to_sdf
    scale: float = 0.95  # of the cube's edge: leaves room for the band [B]
    shell: float = 0.55  # half thickness of open sheets, voxels [D]
    sharp_angle: float = 30.0  # degrees between the faces of a sharp edge [D]
    workers: int = 0  # 0: one per core
    limit: int = 0  # only the first meshes; 0: all


def prepare(entry: MeshEntry, config: PrepareShapesConfig) -> dict[str, int]:
    """Write the missing files of a mesh; return its number of tokens at each resolution.

    Raises:
        ValueError: the mesh cannot be read, or has no surface.
        OSError: a file cannot be read or written.
    """
    num_tokens, mesh = {}, None
    for R in config.resolutions:
        path = shape_path(config.data_dir, R, entry.name)
        tokens = _tokens_in(path)
        if tokens is None:
            if mesh is None:
                vertices, faces, _ = read_mesh(entry)
                mesh = normalize_mesh(vertices, config.scale), faces
            band = (config.bands or {}).get(str(R))
            # one thread: each core has its own mesh
            sdf = mesh_to_sdf(*mesh, R, band, config.shell, config.sharp_angle, threads=1)
            tokens = len(sdf.block_coords)
            if tokens == 0:
                raise ValueError(f"expected a surface, got no active voxel at resolution {R}")
            save_shape(path, sdf)
        num_tokens[str(R)] = tokens
    return num_tokens


def _tokens_in(path: Path) -> int | None:
    """The number of blocks in a shape file, None if it is missing or damaged."""
    try:
        with safe_open(path, "numpy") as file:
            return file.get_slice("block_coords").get_shape()[0]
    except (FileNotFoundError, SafetensorError):
        return None


def prepare_all(entries: list[MeshEntry], config: PrepareShapesConfig) -> Iterator[tuple[MeshEntry, dict | str]]:
    """Yield each mesh with its tokens, or with the error.

    A mesh that kills its process (out of memory) breaks the pool. The meshes in progress are then tried again, one by
    one.
    """
    workers = config.workers or os.cpu_count() or 1
    pending, suspects = list(reversed(entries)), []
    while pending or suspects:
        alone = bool(suspects)
        queue = [suspects.pop()] if alone else pending
        running = {}
        with ProcessPoolExecutor(1 if alone else workers, multiprocessing.get_context("spawn")) as pool:
            try:
                while queue or running:
                    while queue and len(running) < 2 * workers:
                        running[pool.submit(prepare, queue[-1], config)] = queue[-1]  # raises where the pool is broken
                        queue.pop()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        entry = running[future]
                        try:
                            result = future.result()
                        except BrokenProcessPool:
                            raise
                        except Exception as error:  # one bad mesh in thousands must not end the run; it is reported
                            result = f"{type(error).__name__}: {error}"
                        del running[future]
                        yield entry, result
            except BrokenProcessPool:
                if alone:
                    yield from ((entry, "the process died (out of memory?)") for entry in running.values())
                else:
                    suspects = list(running.values())


def main(config: PrepareShapesConfig) -> list[dict]:
    """Convert all meshes; return the records of index.json."""
    data_dir = Path(config.data_dir)
    entries = list_meshes(config.meshes)
    entries = entries[: config.limit or None]
    for R in config.resolutions:
        shape_path(data_dir, R, "").parent.mkdir(parents=True, exist_ok=True)
    records, num_failures = [], 0
    with open(data_dir / "failures.jsonl", "w") as failures, tqdm(total=len(entries), unit="mesh") as progress:
        for entry, result in prepare_all(entries, config):
            if isinstance(result, dict):
                records.append({"name": entry.name, "source": entry.source, "split": entry.split, "num_tokens": result})
            else:
                failures.write(json.dumps({"name": entry.name, "path": str(entry.path), "error": result}) + "\n")
                failures.flush()
                num_failures += 1
                progress.set_postfix(failures=num_failures)
            progress.update()
    records.sort(key=lambda record: record["name"])
    with replacing(data_dir / "index.json") as temporary:
        temporary.write_text(json.dumps(records, indent=1))
    print(f"{len(records)} shapes in {data_dir}, {num_failures} failures (see {data_dir}/failures.jsonl)")
    return records


if __name__ == "__main__":
    main(load_config(PrepareShapesConfig, sys.argv[1:]))
