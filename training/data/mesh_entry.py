"""The entry of a mesh in a folder of meshes. Imports no trimesh."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".npz", ".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class MeshEntry:
    """One mesh of a folder. The fields from `has_color` to `components` come from the index of a corpus."""

    name: str  # unique in its folder and fit for a file name
    path: Path
    split: str  # train, val or test
    source: str  # who made it, in a corpus; else the name of the folder or collection
    has_color: bool | None = None  # None, here and below: the index lacks it
    boundary_edges: int | None = None
    nonmanifold_edges: int | None = None
    components: int | None = None
    turned: bool = False  # its front looks toward -Z; `read_mesh` turns it
    deformed: bool = False  # `read_mesh` deforms it, see deformed_meshes.py
    about: dict[str, str] = field(default_factory=dict, hash=False)  # title, licence, author, ...: what is known


def split_of(name: str) -> str:
    """Choose train (90 %), val (5 %) or test (5 %) by the name alone, so that a growing folder keeps its splits."""
    percent = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if percent < 90 else "val" if percent < 95 else "test"
