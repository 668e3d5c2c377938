"""Meshes -> sparse SDF: one file per shape and resolution, as data for all further training.

    python -m training.prepare_shapes training/configs/tiny_shapes.toml meshes=my_meshes data_dir=data/mine

Reads a folder of meshes (.npz corpus with index.json, or .glb .obj .ply .stl ..., Y up, front toward +Z), scales
each to 0.95 of the cube and writes

    data_dir/shapes/<R>/<name>.safetensors   block_coords (M,3) int16, sdf (M,8,8,8) fp16, sharp (M,64) packed bits
    data_dir/index.json                      records: name, source, split, num_tokens per resolution
    data_dir/failures.jsonl                  meshes that could not be read or converted, and why

Existing files of the same mesh and settings are kept, so a stopped run continues where it was. One process per core.
`shard=i/n` does the i-th of n parts, as a task of an array (docs/cluster.md), and writes index.<i>-of-<n>.json. Exit
code 1: no mesh could be prepared, or the disk refused a file.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh
from training.command import run_command
from training.data.index_files import update_index
from training.data.meshes import MeshEntry, check_source, choose_meshes, read_mesh
from training.data.packs import open_data
from training.data.shape_files import read_summary, save_shape, shape_path
from training.data.shards import Shard
from training.mesh_jobs import AllFailedError, Failure, check_engine, finished, run_engine

SECONDS_BETWEEN_INDEXES = 120


@dataclass(frozen=True)
class PrepareShapesConfig:
    meshes: str = "meshes"
    data_dir: str = "data"
    resolutions: tuple[int, ...] = (256,)
    bands: dict[str, float] | None = None  # in voxels, by resolution: {"256" = 2}; None: the paper's, see mesh_to_sdf
    scale: float = 0.95  # of the cube's edge: leaves room for the band [B]
    shell: float = 0.55  # half thickness of open sheets, voxels [D]
    sharp_angle: float = 30.0  # degrees between the faces of a sharp edge [D]
    source: str = ""  # corpus, folder, objaverse, objaverse-xl or shapenet; "": seen from the files in `meshes`
    names: str = ""  # file with the names of the meshes to take, one on each line; "": all
    deformed: int = 0  # 1, 2, ...: take deformed copies of the training meshes, another series for each number [D]
    engine: str = "processes"  # of this machine; or "ray": a running Ray cluster (docs/cluster.md)
    workers: int = 0  # processes of this machine; 0: one per core
    limit: int = 0  # only the first meshes; 0: all
    shard: str = "0/1"  # the part i/n of the meshes that this task prepares
    verify: bool = False  # read existing files and compare them with their checksums

    def __post_init__(self):
        Shard.parse(self.shard)
        check_engine(self.engine)
        check_source(self.source)

    def settings(self, resolution: int) -> dict[str, Any]:
        """The settings that a file of this resolution depends on."""
        band = (self.bands or {}).get(str(resolution))
        return {"scale": self.scale, "band": band, "shell": self.shell, "sharp_angle": self.sharp_angle}


class Prepared(NamedTuple):
    """The files of a mesh."""

    num_tokens: dict[str, int]  # by resolution
    checksums: dict[str, str]  # by resolution; "" for files of older versions
    num_outdated: int = 0  # files made again, because the mesh or the settings had changed
    num_unknown: int = 0  # files kept that do not say their settings


def prepare(entry: MeshEntry, config: PrepareShapesConfig) -> Prepared:
    """Write the files of a mesh that are missing, damaged, or of another mesh or other settings.

    Raises:
        ValueError: the mesh cannot be read, or has no surface.
        OSError: a file cannot be read or written.
    """
    num_tokens, checksums, mesh, num_outdated, num_unknown = {}, {}, None, 0, 0
    size = _size_of(entry.path)
    for R in config.resolutions:
        path = shape_path(config.data_dir, R, entry.name)
        made_of = config.settings(R) | {"mesh_bytes": size}
        summary = read_summary(path, "block_coords", config.verify)
        stored = summary.about.get("made_of", {}) if summary else {}
        if summary and (not stored or size is None or stored == made_of):
            num_unknown += not stored
            num_tokens[str(R)], checksums[str(R)] = summary.tokens, summary.checksum
            continue
        if mesh is None:
            vertices, faces, _ = read_mesh(entry)
            mesh = normalize_mesh(vertices, config.scale), faces
        # one thread: each core has its own mesh
        sdf = mesh_to_sdf(*mesh, R, made_of["band"], config.shell, config.sharp_angle, threads=1)
        if len(sdf.block_coords) == 0:
            raise ValueError(f"expected a surface, got no active voxel at resolution {R}")
        checksums[str(R)] = save_shape(path, sdf, {"made_of": made_of})
        num_tokens[str(R)] = len(sdf.block_coords)
        num_outdated += summary is not None
    for R in _other_resolutions(config):
        summary = read_summary(shape_path(config.data_dir, R, entry.name), "block_coords")
        stored = summary.about.get("made_of", {}) if summary else {}
        if summary and stored.get("scale", config.scale) == config.scale and stored.get("mesh_bytes", size) == size:
            num_tokens[str(R)], checksums[str(R)] = summary.tokens, summary.checksum
    return Prepared(num_tokens, checksums, num_outdated, num_unknown)


def _size_of(path: Path) -> int | None:
    """The bytes of a mesh file, by which a changed mesh is found; None if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def _other_resolutions(config: PrepareShapesConfig) -> list[int]:
    """The resolutions that are in the folder, but not in the config."""
    folder = shape_path(config.data_dir, 0, "").parents[1]
    found = {int(path.name) for path in folder.iterdir() if path.name.isdecimal()}
    return sorted(found - set(config.resolutions))


def prepare_all(
    entries: list[MeshEntry], config: PrepareShapesConfig
) -> Generator[tuple[MeshEntry, Prepared | Failure]]:
    """Yield each mesh with its files, or with the reason why it has none."""
    return run_engine(prepare, entries, config)


def main(config: PrepareShapesConfig) -> list[dict]:
    """Convert this task's meshes; return their records in the index.

    Raises:
        FileNotFoundError: there is no such folder, or it has no mesh.
        ValueError: no mesh has one of the names, or `data_dir` is packed.
        AllFailedError: no mesh could be converted.
        MachineError: the disk is full or cannot be written. Finished files and all records stay.
    """
    data_dir, shard = Path(open_data(config.data_dir)), Shard.parse(config.shard)
    listed, entries = choose_meshes(config, deformed=config.deformed)
    for R in config.resolutions:
        folder = shape_path(data_dir, R, "").parent
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, {entry.name for entry in entries})
    folder, names = Path(config.meshes).resolve().as_posix(), {entry.name for entry in listed}
    log = shard.file(data_dir / "failures.jsonl")
    records, failed, bad, num_outdated, num_unknown = [], [], set(), 0, 0

    def is_gone(record: dict) -> bool:
        series = config.deformed if record["split"] == "train" else 0
        is_ours = record.get("meshes", folder) == folder and record.get("deformed", 0) == series
        return is_ours and (record["name"] in bad or ("meshes" in record and record["name"] not in names))

    def write_index(at_the_end: bool) -> None:
        bad.update(failure["name"] for failure in failed)
        update_index(data_dir, shard, records, is_gone, in_others=at_the_end)

    try:
        written = time.monotonic()
        for entry, made in finished(prepare_all(entries, config), len(entries), log, failed):
            record: dict[str, Any] = {"name": entry.name, "source": entry.source, "split": entry.split}
            if entry.deformed:
                record["deformed"] = config.deformed
            records.append(record | {"num_tokens": made.num_tokens, "checksums": made.checksums, "meshes": folder})
            num_outdated, num_unknown = num_outdated + made.num_outdated, num_unknown + made.num_unknown
            if time.monotonic() - written > SECONDS_BETWEEN_INDEXES:
                write_index(at_the_end=False)
                written = time.monotonic()
    finally:
        write_index(at_the_end=True)  # also where the run is stopped or the disk is full
    records.sort(key=lambda record: record["name"])
    if num_outdated:
        print(f"{num_outdated} files were made again, because their mesh or the settings had changed")
    if num_unknown:
        print(f"{num_unknown} files of an older version do not say their settings and were kept; delete to make again")
    print(f"{len(records)} shapes in {data_dir}, {len(failed)} failures (see {log})")
    if failed and not records:
        raise AllFailedError(f"all {len(failed)} meshes failed, see {log}")
    return records


def remove_leftovers(folder: Path, names: set[str]) -> None:
    """Remove what killed runs left of the files of these meshes, which no other task writes."""
    for path in folder.glob(".*.safetensors"):
        if path.stem[1:].rpartition(".")[0] in names:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main, PrepareShapesConfig)
