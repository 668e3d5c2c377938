"""Training meshes: the entries of a folder, and the triangles of an entry.

Two kinds of folder are read:
- a corpus: `index.json` (a list of records with `file`, `source`, `split`, ...) beside its meshes;
- any folder of mesh files (`SUFFIXES`, searched recursively), split 90/5/5 by the sha1 of the name.

Meshes are expected with Y up and the front toward +Z, as in glTF; they are not turned.
"""

import dataclasses
import errno
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh

from d3ds2.images.surface_colors import SurfaceColors
from d3ds2.meshes.mesh_parts import read_parts
from d3ds2.meshes.triangles import used_vertices
from training.data.mesh_colors import face_colors, surface_colors

SUFFIXES = (".npz", ".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
SPLITS = ("train", "val", "test")
LOST_STORAGE = {  # errors of a disk or a network drive, whatever the file
    getattr(errno, name) for name in ("EIO", "ESTALE", "ENOTCONN", "EMFILE", "ENFILE") if hasattr(errno, name)
}


@dataclass(frozen=True)
class MeshEntry:
    """One mesh of a folder. The last four fields come from the index of a corpus; None if it lacks them."""

    name: str  # unique in its folder and fit for a file name
    path: Path
    split: str  # train, val or test
    source: str  # who made it, in a corpus; else the name of the folder
    has_color: bool | None = None
    boundary_edges: int | None = None
    nonmanifold_edges: int | None = None
    components: int | None = None


def split_of(name: str) -> str:
    """Choose train (90 %), val (5 %) or test (5 %) by the name alone, so that a growing folder keeps its splits."""
    percent = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if percent < 90 else "val" if percent < 95 else "test"


def list_meshes(folder: str | Path) -> list[MeshEntry]:
    """List all meshes of a folder, sorted by name.

    Files that differ by their suffix alone are named with it: chair.glb beside chair.obj. Where two names are still the
    same, the second file is skipped and printed.

    Raises:
        FileNotFoundError: the folder does not exist, or has no mesh.
        ValueError: `index.json` is not a list of records with file, source and split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of meshes, got {folder}, which does not exist or is a file")
    index = folder / "index.json"
    entries = _read_index(index) if index.is_file() else _scan(folder)
    if not entries:
        raise FileNotFoundError(f"expected meshes ({', '.join(SUFFIXES)}) in {folder}, found none")
    return _with_own_names(entries)


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
    known = ("has_color", "boundary_edges", "nonmanifold_edges", "components")
    return MeshEntry(
        name=Path(record["file"]).stem,
        path=folder / record["file"],
        split=record["split"],
        source=record["source"],
        **{key: record.get(key) for key in known},
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
        vertices, faces, colors = _read_npz(path) if path.suffix.lower() == ".npz" else _read_parts(path, colors_of)
    except MemoryError:
        raise
    except Exception as error:  # a loader meets a strange file with any error
        if isinstance(error, OSError) and error.errno in LOST_STORAGE:
            raise
        raise ValueError(f"expected a mesh in {path}, got a file that cannot be read as one: {error}") from error
    if len(faces) == 0:
        raise ValueError(f"expected at least one triangle in {path}, got none")
    if not np.isfinite(vertices).all():
        raise ValueError(f"expected finite vertices in {path}, got NaN or infinity")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"expected face indices in [0, {len(vertices)}) in {path}, got {faces.min()}..{faces.max()}")
    return *used_vertices(vertices, faces), None if entry.has_color is False else colors


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
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
