"""Meshes -> scores in the index, by which training data is chosen.

    python -m training.score_meshes training/configs/score_meshes.toml meshes=MESHES data_dir=DATA

Writes two keys into each mesh's record in data_dir/index.json:

    "scores": {"faces": 5120, "closed": 1.0, ...}          see mesh_quality.Scores
    "about": {"title": ..., "licence": ..., ...}           what the collection says of the mesh

and meshes that could not be scored into data_dir/score_failures.jsonl. It may run before or after prepare_shapes: each
keeps what the other wrote. Scores of an unchanged mesh are kept, so a stopped run continues where it was. `shard` and
`engine` as for prepare_shapes. `python -m training.select_meshes` then writes a list of names.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.command import run_command
from training.data.index_files import index_files, read_index, update_index
from training.data.meshes import MeshEntry, check_source, choose_meshes, read_textured_mesh
from training.data.packs import open_data
from training.data.shards import Shard
from training.mesh_jobs import AllFailedError, check_engine, finished, run_engine
from training.mesh_quality import Scores, score_mesh

SECONDS_BETWEEN_INDEXES = 120
DIGITS = 4  # of a score after the point


@dataclass(frozen=True)
class ScoreMeshesConfig:
    meshes: str = "meshes"
    data_dir: str = "data"
    source: str = ""  # corpus, folder, objaverse, objaverse-xl or shapenet; "": seen from the files in `meshes`
    names: str = ""  # file with the names of the meshes to score, one on each line; "": all
    engine: str = "processes"  # of this machine; or "ray": a running Ray cluster (docs/cluster.md)
    workers: int = 0  # processes of this machine; 0: one per core
    limit: int = 0  # only the first meshes; 0: all
    shard: str = "0/1"  # the part i/n of the meshes that this task scores

    def __post_init__(self):
        Shard.parse(self.shard)
        check_engine(self.engine)
        check_source(self.source)


def score(entry: MeshEntry, config: ScoreMeshesConfig) -> dict[str, Any]:
    """Return the scores of a mesh, and the size of its file as `mesh_bytes`.

    Raises:
        ValueError: the mesh cannot be read, or has no surface.
        OSError: the file cannot be read.
    """
    scores = score_mesh(*read_textured_mesh(entry))._asdict()
    rounded = {name: round(value, DIGITS) for name, value in scores.items()}
    return rounded | {"mesh_bytes": entry.path.stat().st_size}


def main(config: ScoreMeshesConfig) -> int:
    """Score this task's meshes that have no scores; return their number.

    Raises:
        FileNotFoundError: there is no such folder, or it has no mesh.
        ValueError: no mesh has one of the names, an index file is damaged, or `data_dir` is packed.
        AllFailedError: no mesh could be scored.
        MachineError: the disk is full or cannot be written. Finished scores stay.
    """
    data_dir, shard = Path(open_data(config.data_dir)), Shard.parse(config.shard)
    data_dir.mkdir(parents=True, exist_ok=True)
    _, entries = choose_meshes(config, about=True)
    known = {}
    if index_files(data_dir):
        known = {record["name"]: record["scores"] for record in read_index(data_dir) if "scores" in record}
    entries = [entry for entry in entries if not _is_scored(entry, known.get(entry.name, {}))]
    folder = Path(config.meshes).resolve().as_posix()
    log, records, failed = shard.file(data_dir / "score_failures.jsonl"), [], []

    def write_index(at_the_end: bool) -> None:
        update_index(data_dir, shard, records, lambda record: False, in_others=at_the_end)

    try:
        written = time.monotonic()
        for entry, scores in finished(run_engine(score, entries, config), len(entries), log, failed):
            record = {"name": entry.name, "source": entry.source, "split": entry.split, "meshes": folder}
            records.append(record | {"scores": scores} | ({"about": entry.about} if entry.about else {}))
            if time.monotonic() - written > SECONDS_BETWEEN_INDEXES:
                write_index(at_the_end=False)
                written = time.monotonic()
    finally:
        write_index(at_the_end=True)  # also where the run is stopped or the disk is full
    print(f"{len(records)} meshes scored in {data_dir}, {len(failed)} failures (see {log})")
    if failed and not records:
        raise AllFailedError(f"all {len(failed)} meshes failed, see {log}")
    return len(records)


def _is_scored(entry: MeshEntry, scores: dict[str, Any]) -> bool:
    """Whether these are all the scores of a mesh whose file has not changed."""
    try:
        size = entry.path.stat().st_size
    except FileNotFoundError:
        return False
    return scores.keys() >= set(Scores._fields) and scores.get("mesh_bytes") == size


if __name__ == "__main__":
    run_command(main, ScoreMeshesConfig)
