"""Training meshes: the entries of a folder, and the triangles of an entry.

These folders are read (`SOURCES`):
- corpus: `index.json` (a list of records with `file`, `source`, `split`, ...) beside its meshes;
- folder: any folder of mesh files (`SUFFIXES`, searched recursively), split 90/5/5 by the sha1 of the name;
- objaverse, objaverse-xl, shapenet: see `mesh_collections`.

Meshes are expected with Y up and the front toward +Z, as in glTF; only ShapeNet's are turned.
"""

import dataclasses
import errno
import json
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from d3ds2.images.surface_colors import SurfaceColors
from d3ds2.meshes.mesh_parts import read_parts
from d3ds2.meshes.triangles import used_vertices
from d3ds2.storage.one_line import one_line
from training.data.deformed_meshes import deform, name_of_copy
from training.data.mesh_collections import (
    OBJAVERSE,
    OBJAVERSE_XL,
    SHAPENET,
    collection_of,
    list_objaverse,
    list_objaverse_xl,
    list_shapenet,
)
from training.data.mesh_colors import face_colors, surface_colors
from training.data.mesh_entry import SPLITS, SUFFIXES, MeshEntry, split_of
from training.data.name_lists import read_names
from training.data.shards import Shard

CORPUS, FOLDER = "corpus", "folder"
SOURCES = (CORPUS, FOLDER, OBJAVERSE, OBJAVERSE_XL, SHAPENET)
KNOWN_ABOUT = {"name": "title", "licence": "licence", "attribution": "author", "url": "url", "category": "category"}

SMALL_ARCHIVE, MOST_COMPRESSED = 64 << 20, 100  # bytes that any .npz may unpack to; times its size
LOST_STORAGE = {  # errors of a disk or a network drive, whatever the file
    getattr(errno, name) for name in ("EIO", "ESTALE", "ENOTCONN", "EMFILE", "ENFILE") if hasattr(errno, name)
}


def list_meshes(folder: str | Path, source: str = "", about: bool = False) -> list[MeshEntry]:
    """List all meshes of a folder, sorted by name.

    Files that differ by their suffix alone are named with it: chair.glb beside chair.obj. Where two names are still the
    same, the second file is skipped and printed.

    Args:
        source: how the folder is laid out, one of SOURCES; "" to see it from the files.
        about: read what is known of each mesh, which takes longer.

    Raises:
        FileNotFoundError: the folder does not exist, or has no mesh.
        ValueError: the source is unknown, or `index.json` is not a list of records with file, source and split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of meshes, got {folder}, which does not exist or is a file")
    check_source(source)
    index = folder / "index.json"
    if not source:
        source = CORPUS if index.is_file() else collection_of(folder) or FOLDER
    if source == CORPUS:
        entries = _read_index(index)
    elif source == FOLDER:
        entries = _scan(folder)
    else:
        list_collection = {OBJAVERSE: list_objaverse, OBJAVERSE_XL: list_objaverse_xl, SHAPENET: list_shapenet}[source]
        entries = list_collection(folder, about)
    if not entries:
        raise FileNotFoundError(f"expected meshes ({', '.join(SUFFIXES)}) in {folder}, found none of source {source}")
    return _with_own_names(entries)


def check_source(source: str) -> None:
    """Raise ValueError for a source that is neither "" nor one of SOURCES."""
    if source and source not in SOURCES:
        raise ValueError(f"expected source of {', '.join(SOURCES)}, got {source!r}")


def choose_meshes(
    config: Any, splits: tuple[str, ...] = SPLITS, about: bool = False, deformed: int = 0
) -> tuple[list[MeshEntry], list[MeshEntry]]:
    """List the meshes of a config with the keys meshes, source, names, limit and shard.

    Args:
        about: read what is known of each mesh, which takes longer.
        deformed: take the copies of this series in place of the training meshes, see deformed_meshes.py; 0: no copies.

    Returns:
        All meshes of the folder, and those of the splits that this task works on.

    Raises:
        OSError: the folder or the list of names cannot be read.
        ValueError: as `list_meshes`; no mesh has one of the names and belongs to one of the splits; or the series is
            negative.
    """
    if deformed < 0:
        raise ValueError(f"expected deformed as 0 or the number of a series, got {deformed}")
    listed = list_meshes(config.meshes, config.source, about)
    chosen = [entry for entry in listed if entry.split in splits]
    if config.names:
        names = read_names(config.names)
        chosen = [entry for entry in chosen if entry.name in names]
    if not chosen:
        named = f" with names of {config.names}" if config.names else ""
        raise ValueError(f"expected meshes of the splits {splits}{named} in {config.meshes}, got none")
    shard = Shard.parse(config.shard)
    if deformed:
        listed, chosen = ([_copy(entry, deformed) for entry in entries] for entries in (listed, chosen))
    return listed, [entry for entry in chosen[: config.limit or None] if shard.has(entry.name)]


def _copy(entry: MeshEntry, series: int) -> MeshEntry:
    """Return the deformed copy of a training mesh; other meshes stay."""
    if entry.split != "train":
        return entry
    return dataclasses.replace(entry, name=name_of_copy(entry.name, series), deformed=True)


def _with_own_names(entries: list[MeshEntry]) -> list[MeshEntry]:
    """Give entries of the same name another one each, and sort all by name."""
    count, named = Counter(entry.name for entry in entries), {}
    for entry in sorted(entries, key=lambda entry: (entry.name, str(entry.path))):
        if count[entry.name] > 1:
            entry = dataclasses.replace(entry, name=entry.name + entry.path.suffix)
        first = named.setdefault(entry.name, entry)
        if first is not entry:
            print(f"skipped {entry.path}: {first.path} has its name {entry.name!r} already", file=sys.stderr)
    return [named[name] for name in sorted(named)]


def _read_index(index: Path) -> list[MeshEntry]:
    try:
        records = json.loads(index.read_text())
        return [_entry_of_record(index.parent, record) for record in records]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a list of records with file, source and split in {index}: {error!r}") from error


def _entry_of_record(folder: Path, record: dict) -> MeshEntry:
    if record["split"] not in SPLITS:
        raise ValueError(f"expected a split of {SPLITS} for {record['file']}, got {record['split']!r}")
    return MeshEntry(
        name=Path(record["file"]).stem,
        path=folder / record["file"],
        split=record["split"],
        source=record["source"],
        about={to: str(record[key]) for key, to in KNOWN_ABOUT.items() if record.get(key)},
        has_color=record.get("has_color"),
        boundary_edges=record.get("boundary_edges"),
        nonmanifold_edges=record.get("nonmanifold_edges"),
        components=record.get("components"),
    )


def _scan(folder: Path) -> list[MeshEntry]:
    entries = []
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = "__".join(path.relative_to(folder).with_suffix("").parts)
            entries.append(MeshEntry(name, path, split_of(name), folder.name))
    return entries


def read_mesh(entry: MeshEntry) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the triangles of one mesh, all parts merged, as they lie in the file (not normalised).

    Returns:
        vertices (V,3) float32, faces (F,3) int64, face_colors (F,3) uint8 sRGB, or None where the mesh has no colour
        (no colour in the file, or `has_color` false in the index).

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not a mesh, has no triangle, or its vertices or indices are out of range.
        OSError: its disk or network drive is gone.
    """
    return _read(entry, face_colors_of)


def read_textured_mesh(entry: MeshEntry) -> tuple[np.ndarray, np.ndarray, SurfaceColors | np.ndarray | None]:
    """Return the same as `read_mesh`, but where colours vary within faces, the colours of all points.

    Raises as `read_mesh`.
    """
    is_gltf = entry.path.suffix.lower() in (".glb", ".gltf")
    return _read(entry, lambda parts: surface_colors(parts, linear=is_gltf))


def face_colors_of(parts: list[trimesh.Trimesh]) -> np.ndarray:
    """Return the colours of the faces of all parts, (F,3) uint8."""
    return np.concatenate([face_colors(part) for part in parts])


def _read(entry: MeshEntry, colors_of: Callable) -> tuple:
    path = entry.path
    if not path.is_file():
        raise FileNotFoundError(f"expected a mesh at {path}, found no file")
    try:
        with np.errstate(all="ignore"):  # numbers that are not finite are an error a little later
            vertices, faces, colors = _read_npz(path) if path.suffix.lower() == ".npz" else _read_parts(path, colors_of)
    except MemoryError:
        raise
    except Exception as error:  # a loader meets a strange file with any error
        if isinstance(error, OSError) and error.errno in LOST_STORAGE:
            raise
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"expected a mesh in {path}, got a file that cannot be read as one: {reason}") from error
    if len(faces) == 0:
        raise ValueError(f"expected at least one triangle in {path}, got none")
    if not np.isfinite(vertices).all():
        raise ValueError(f"expected finite vertices in {path}, got NaN or infinity")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"expected face indices in [0, {len(vertices)}) in {path}, got {faces.min()}..{faces.max()}")
    if entry.turned:
        vertices = vertices * np.array([-1, 1, -1], np.float32)
    vertices, faces = used_vertices(vertices, faces)
    if entry.deformed:
        vertices = deform(vertices, entry.name)
    return vertices, faces, None if entry.has_color is False else colors


def _check_npz(path: Path) -> None:
    """Check that the arrays of a .npz are as large as its zip says, and that the file can hold that much."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = read_header[version](stream)
                if math.prod(shape) * dtype.itemsize + stream.tell() != entry.file_size:
                    raise ValueError(f"{entry.filename} claims {shape} of {dtype}, but has {entry.file_size} bytes")
    held, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if held > max(SMALL_ARCHIVE, MOST_COMPRESSED * size):
        raise ValueError(f"its {size:,} bytes unpack to {held:,}")


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    _check_npz(path)
    with np.load(path, allow_pickle=False) as file:
        vertices, faces = file["v"], file["f"].astype(np.int64)
        colors = file["pal"][file["fc"]].astype(np.uint8) if "fc" in file and "pal" in file else None
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"expected v (V,3) and f (F,3), got {vertices.shape} and {faces.shape}")
    if colors is not None and colors.shape != faces.shape:
        raise ValueError(f"expected a colour for each of {len(faces)} faces, got {colors.shape}")
    if vertices.dtype == np.uint16:  # as in the corpus: centred, longest side 1
        vertices = vertices.astype(np.float32) / 65535 - 0.5
    return vertices.astype(np.float32), faces, colors


def _read_parts(path: Path, colors_of: Callable) -> tuple:
    parts = read_parts(path, path.suffix.lower())
    if not parts:
        raise ValueError("no triangles")
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts])
    vertices = np.concatenate([part.vertices for part in parts]).astype(np.float32)
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=False)]).astype(np.int64)
    if not any(part.visual.defined for part in parts):
        return vertices, faces, None
    return vertices, faces, colors_of(parts)
