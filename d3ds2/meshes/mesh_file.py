"""A mesh -> a file: GLB, OBJ, PLY or STL, written whole or not at all; and a file of any common kind -> a mesh."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..storage.atomic_file import replacing
from .mesh import Mesh, area_weighted_normals

FORMATS = (".glb", ".obj", ".ply", ".stl")
READABLE = (*FORMATS, ".gltf", ".off")
GENERATOR = "ComfyUI-D3DS2"
OBJ_LINES = 1 << 14  # formatted at once
GREY = (0.6, 0.6, 0.6, 1.0)  # base colour of the GLB material; the format's own default is white metal


class MeshFileError(ValueError):
    """The file cannot be written or read: its extension, its folder, its content. The message is one line."""


def check_mesh_path(path: str | Path) -> None:
    """See that a mesh can be written to `path`, before there is one.

    Raises:
        MeshFileError: unknown extension, no such folder, or no permission to write there.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise MeshFileError(f"expected an output that ends in {', '.join(FORMATS)}, got {path}")
    check_writable(path)


def check_writable(path: str | Path) -> None:
    """See that a file can be written to `path`, by making an empty one beside it and removing it again.

    Raises:
        MeshFileError: no such folder, no permission, or a folder of that name.
    """
    path = Path(path)
    if path.is_dir():
        raise MeshFileError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise MeshFileError(f"cannot write {path}: no folder {path.parent}")
    trial = path.with_name(f".{path.stem}.trial")
    try:
        with replacing(trial):
            pass
        trial.unlink()
    except OSError as error:
        raise MeshFileError(f"cannot write {path}: {error.strerror}") from None


def save_mesh(path: str | Path, mesh: Mesh, metadata: dict[str, str | int | float] | None = None) -> None:
    """Write a mesh with its vertex normals, Y up as it is; the format follows from the extension.

    Args:
        path: ends in .glb, .obj, .ply or .stl. STL has no vertex normals.
        mesh: at least one face.
        metadata: how it was made; GLB keeps it in `asset.extras`, the other formats have no place for it.

    Raises:
        MeshFileError: no faces, unknown extension, or the file cannot be written.
    """
    path = Path(path)
    data = mesh_bytes(path.suffix.lower(), mesh, metadata)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise MeshFileError(f"cannot write {path}: {error.strerror}") from None


def mesh_bytes(kind: str, mesh: Mesh, metadata: dict[str, str | int | float] | None = None) -> bytes:
    """The content of such a file; `kind` is one of FORMATS. Arguments and errors as `save_mesh`."""
    import trimesh  # slow to import, and only the end of a run needs it

    if kind not in FORMATS:
        raise MeshFileError(f"expected an output that ends in {', '.join(FORMATS)}, got {kind!r}")
    if len(mesh.faces) == 0:
        raise MeshFileError("expected a mesh with faces, got none")
    if kind == ".obj":
        return _obj_bytes(mesh)
    exported = trimesh.Trimesh(
        np.asarray(mesh.vertices), np.asarray(mesh.faces), vertex_normals=np.asarray(mesh.normals), process=False
    )
    arguments: dict[str, Any] = {".stl": {}, ".ply": {"vertex_normal": True}, ".glb": {"include_normals": True}}[kind]
    if kind == ".glb":
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=GREY, metallicFactor=0.0, roughnessFactor=0.8)
        exported.visual = trimesh.visual.TextureVisuals(material=material)

        def describe(tree: dict) -> None:
            tree["asset"] |= {"generator": GENERATOR, "extras": metadata or {}}

        arguments["tree_postprocessor"] = describe
    return exported.export(file_type=kind[1:], **arguments)


def _obj_bytes(mesh: Mesh) -> bytes:
    """OBJ text, piece by piece: trimesh's writer keeps Python's lock for seconds, and nobody could cancel."""
    parts = [f"# {GENERATOR}\n"]
    for line, rows in (
        ("v %.8g %.8g %.8g\n", mesh.vertices),
        ("vn %.5g %.5g %.5g\n", mesh.normals),
        ("f %d//%d %d//%d %d//%d\n", np.repeat(mesh.faces + 1, 2, axis=1)),
    ):
        for start in range(0, len(rows), OBJ_LINES):
            piece = rows[start : start + OBJ_LINES]
            parts.append(line * len(piece) % tuple(piece.ravel().tolist()))
    return "".join(parts).encode()


def read_mesh(file: BinaryIO, kind: str) -> Mesh:
    """The triangles of a file, all its parts in one, as its scene places them; colours and textures are left out.

    Args:
        file: open for reading; a .gltf must hold its own buffers.
        kind: one of READABLE.

    Raises:
        MeshFileError: another kind, a damaged file, or one without triangles.
    """
    import trimesh

    if kind not in READABLE:
        raise MeshFileError(f"expected a mesh file of {', '.join(READABLE)}, got {kind!r}")
    try:
        loaded = trimesh.load(file, file_type=kind[1:], force="mesh", process=False)
        merged = trimesh.Trimesh(loaded.vertices, loaded.faces, process=True)  # corners that lie in one point are one
    except Exception as error:  # its readers raise whatever they stumble over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MeshFileError(f"the {kind[1:]} file is damaged or holds no mesh ({reason})") from error
    if len(merged.faces) == 0:
        raise MeshFileError(f"the {kind[1:]} file holds no triangles")
    vertices, faces = np.asarray(merged.vertices, np.float32), np.asarray(merged.faces, np.int64)
    return Mesh(vertices, faces, area_weighted_normals(vertices, faces))


def turn_z_up(mesh: Mesh) -> Mesh:
    """The same mesh for programs whose Z points up: (x, y, z) becomes (x, -z, y)."""
    turned = (points[:, [0, 2, 1]] * np.array([1, -1, 1], np.float32) for points in (mesh.vertices, mesh.normals))
    vertices, normals = turned
    return Mesh(vertices, mesh.faces, normals)
