"""Meshes -> surfels: points with normals and colours, from which training renders new pictures in every step.

    python -m training.sample_surfels training/configs/tiny_surfels.toml meshes=my_meshes data_dir=data/mine

Reads the same folder of meshes as prepare_shapes and writes

    data_dir/surfels/<name>.safetensors   points with normals and colours, see data/surfels.py
    data_dir/surfel_failures.jsonl        meshes that could not be read, and why

Existing files of the same mesh and settings are kept, so a stopped run continues where it was. One process per core.
`shard=i/n` does the i-th of n parts, as a task of an array (docs/cluster.md). Exit code 1: no mesh could be read, or
the disk refused a file.

None of it comes from the paper. [D: see docs/paper.md]
"""

import os
from dataclasses import dataclass
from pathlib import Path

from d3ds2.meshes.mesh_to_sdf import normalize_mesh
from training.command import run_command
from training.data.meshes import SPLITS, MeshEntry, check_source, choose_meshes, read_mesh, read_textured_mesh
from training.data.named_generators import generator_of
from training.data.packs import open_data
from training.data.shape_files import read_summary
from training.data.shards import Shard
from training.data.surfels import DIRECTIONS, sample_surfels, surfels_path, write_surfels
from training.mesh_jobs import AllFailedError, check_engine, finished, run_engine
from training.prepare_shapes import remove_leftovers


@dataclass(frozen=True)
class SampleSurfelsConfig:
    meshes: str = "meshes"
    data_dir: str = "data"
    number: int = 131072  # points of each mesh; 12 bytes each
    textures: bool = True  # read textures and colours of vertices; else each face has one colour
    splits: tuple[str, ...] = ("train",)  # whose meshes are sampled
    scale: float = 0.95  # as in prepare_shapes
    seed: int = 0
    source: str = ""  # corpus, folder, objaverse, objaverse-xl or shapenet; "": seen from the files in `meshes`
    names: str = ""  # file with the names of the meshes to take, one on each line; "": all
    deformed: int = 0  # as in prepare_shapes
    engine: str = "processes"  # of this machine; or "ray": a running Ray cluster (docs/cluster.md)
    workers: int = 0  # processes of this machine; 0: one per core
    limit: int = 0  # only the first meshes; 0: all
    shard: str = "0/1"  # the part i/n of the meshes that this task samples
    verify: bool = False  # read existing files and compare them with their checksums

    def __post_init__(self):
        Shard.parse(self.shard)
        check_engine(self.engine)
        check_source(self.source)
        if self.number <= len(DIRECTIONS):
            raise ValueError(f"expected number > {len(DIRECTIONS)}, got {self.number}")
        if not set(self.splits) <= set(SPLITS):
            raise ValueError(f"expected splits out of {SPLITS}, got {self.splits}")


def sample_mesh(entry: MeshEntry, config: SampleSurfelsConfig) -> bool:
    """Write the file of a mesh, unless it exists; return whether it was written.

    Raises:
        ValueError: the mesh cannot be read, or has no area.
        OSError: a file cannot be read or written.
    """
    path = surfels_path(config.data_dir, entry.name)
    size = entry.path.stat().st_size if entry.path.is_file() else None
    made_of = {key: getattr(config, key) for key in ("number", "textures", "scale", "seed")} | {"mesh_bytes": size}
    summary = read_summary(path, "points", config.verify)
    stored = summary.about.get("made_of", {}) if summary else {}
    if stored and (size is None or stored == made_of):
        return False
    vertices, faces, colors = (read_textured_mesh if config.textures else read_mesh)(entry)
    rng = generator_of(f"{config.seed}/{entry.name}")
    surfels = sample_surfels(normalize_mesh(vertices, config.scale), faces, colors, config.number, rng)
    write_surfels(path, surfels, {"made_of": made_of})
    return True


def main(config: SampleSurfelsConfig) -> list[dict]:
    """Sample this task's meshes; return the records of surfel_failures.jsonl.

    Raises:
        FileNotFoundError: there is no such folder of meshes.
        ValueError: no mesh belongs to these splits, or `data_dir` is packed.
        AllFailedError: no mesh could be sampled.
        MachineError: the disk is full or cannot be written. Finished files stay.
    """
    data_dir, shard = Path(open_data(config.data_dir)), Shard.parse(config.shard)
    _, entries = choose_meshes(config, config.splits, deformed=config.deformed)
    folder = surfels_path(data_dir, "").parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, {entry.name for entry in entries})
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the workers: each core has its own mesh
    log = shard.file(data_dir / "surfel_failures.jsonl")
    failed = []
    written = sum(made for _, made in finished(run_engine(sample_mesh, entries, config), len(entries), log, failed))
    print(f"surfels of {written} meshes written in {data_dir}, {len(failed)} meshes failed (see {log})")
    if entries and len(failed) == len(entries):
        raise AllFailedError(f"all {len(failed)} meshes failed, see {log}")
    return failed


if __name__ == "__main__":
    run_command(main, SampleSurfelsConfig)
