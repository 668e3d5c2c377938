"""Write a mesh to a GLB, OBJ, PLY, STL or 3MF file, whole or not at all; read a mesh from a file of any common kind."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..storage.atomic_file import check_creatable, replacing
from ..storage.one_line import OneLineError, one_line
from .appearance import Appearance, color_bytes, gltf_visual
from .mesh import Mesh, area_weighted_normals
from .three_mf import three_mf_bytes
from .triangles import checked_faces, checked_vertices, used_vertices

FORMATS = (".glb", ".obj", ".ply", ".stl", ".3mf")
READABLE = (".glb", ".obj", ".ply", ".stl", ".gltf", ".off")
GENERATOR = "ComfyUI-D3DS2"
OBJ_LINES = 1 << 14  # lines formatted at once
GREY = (0.22, 0.22, 0.22, 1.0)  # linear base colour of the GLB material: in the light of viewers, relief shows


class MeshFileError(OneLineError):
    """A file that cannot be written or read because of its extension, folder or content. The message is one line."""


def check_mesh_path(path: str | Path) -> None:
    """Check that a mesh can be written to `path`, before there is one.

    Raises:
        MeshFileError: the extension is unknown, the folder is missing, or it cannot be written to.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise MeshFileError(f"expected an output that ends in {', '.join(FORMATS)}, got {path}")
    check_writable(path)


def check_writable(path: str | Path) -> None:
    """Check that a file can be written to `path`: make an empty file beside it and remove it again.

    Raises:
        MeshFileError: the folder is missing, it cannot be written to, or `path` is itself a folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise MeshFileError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise MeshFileError(f"cannot write {path}: no folder {path.parent}")
        check_creatable(path)
    except OSError as error:
        raise MeshFileError(f"cannot write {path}: {error.strerror}") from None
    except ValueError as error:  # a NUL character in the name
        raise MeshFileError(f"cannot write {path}: {error}") from None


def save_mesh(path: str | Path, mesh: Mesh, metadata: dict[str, str | int | float] | None = None) -> None:
    """Write a mesh with its vertex normals and its axes unchanged (Y up); the extension decides the format.

    Args:
        path: ends in one of FORMATS. STL and 3MF have no vertex normals.
        mesh: one with at least one face.
        metadata: how the mesh was made. GLB keeps it in `asset.extras`; the other formats have no place for it.

    Raises:
        MeshFileError: the mesh has no faces, the extension is unknown, or the file cannot be written.
    """
    path = Path(path)
    data = mesh_bytes(path.suffix.lower(), mesh, metadata)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise MeshFileError(f"cannot write {path}: {error.strerror}") from None


def mesh_bytes(
    kind: str,
    mesh: Mesh,
    metadata: dict[str, str | int | float] | None = None,
    appearance: Appearance | None = None,
) -> bytes:
    """Return the content of a mesh file; `kind` is one of FORMATS. Arguments and errors as in `save_mesh`.

    Of the appearance, a file gets what it can hold: see `not_held`.
    """
    import trimesh  # slow to import, and needed only at the end of a run

    look = appearance or Appearance()
    if kind not in FORMATS:
        raise MeshFileError(f"expected an output that ends in {', '.join(FORMATS)}, got {kind!r}")
    if len(mesh.faces) == 0:
        raise MeshFileError("expected a mesh with faces, got none")
    if kind == ".obj":
        return _obj_bytes(mesh, look)
    if kind == ".3mf":
        return three_mf_bytes(mesh.vertices, mesh.faces)
    exported = trimesh.Trimesh(
        np.asarray(mesh.vertices), np.asarray(mesh.faces), vertex_normals=np.asarray(mesh.normals), process=False
    )
    arguments: dict[str, Any] = {".stl": {}, ".ply": {"vertex_normal": True}, ".glb": {"include_normals": True}}[kind]
    if kind == ".glb":
        exported.visual = gltf_visual(look, GREY, roughness=0.8)

        def describe(tree: dict) -> None:
            tree["asset"] |= {"generator": GENERATOR, "extras": metadata or {}}

        arguments["tree_postprocessor"] = describe
    if kind == ".ply" and look.colors is not None:
        exported.visual.vertex_colors = color_bytes(look.colors)
    return exported.export(file_type=kind[1:], **arguments)


def _obj_bytes(mesh: Mesh, look: Appearance) -> bytes:
    """Return OBJ text, made piece by piece: trimesh's writer holds the GIL for seconds, and nobody could cancel."""
    parts = [f"# {GENERATOR}\n"]
    vertices = ("v %.8g %.8g %.8g\n", mesh.vertices)
    if look.colors is not None:  # an extension that most programs read
        vertices = ("v %.8g %.8g %.8g %.4g %.4g %.4g\n", np.hstack([mesh.vertices, look.colors[:, :3]]))
    normals = ("vn %.5g %.5g %.5g\n", mesh.normals)
    if look.uvs is None:
        rest = [normals, ("f %d//%d %d//%d %d//%d\n", np.repeat(mesh.faces + 1, 2, axis=1))]
    else:  # (0, 0) is the lower left corner
        faces = ("f %d/%d/%d %d/%d/%d %d/%d/%d\n", np.repeat(mesh.faces + 1, 3, axis=1))
        rest = [("vt %.7g %.7g\n", look.uvs * [1, -1] + [0, 1]), normals, faces]
    for line, rows in (vertices, *rest):
        for start in range(0, len(rows), OBJ_LINES):
            piece = rows[start : start + OBJ_LINES]
            parts.append(line * len(piece) % tuple(piece.ravel().tolist()))
    return "".join(parts).encode()


def read_mesh(file: BinaryIO, kind: str) -> Mesh:
    """Read the triangles of a file: all parts in one mesh, placed as in its scene, without colours and textures.

    Vertices that no face has are left out.

    Args:
        file: open for reading in binary mode; a .gltf must contain its buffers.
        kind: its extension, one of READABLE.

    Raises:
        MeshFileError: the kind is another, or the file is damaged or has no triangles.
    """
    import trimesh

    from .mesh_parts import read_parts

    if kind not in READABLE:
        raise MeshFileError(f"expected a mesh file of {', '.join(READABLE)}, got {kind!r}")
    try:
        parts = read_parts(file.read(), kind)
        with np.errstate(all="ignore"):  # numbers that are not finite are an error a little later
            loaded = trimesh.util.concatenate(parts) if parts else trimesh.Trimesh()
            vertices, faces = loaded.vertices, loaded.faces
        if len(faces):
            vertices, faces = used_vertices(checked_vertices(vertices), checked_faces(faces, len(vertices)))
        merged = trimesh.Trimesh(vertices, faces, process=True)  # welds corners in the same place
    except Exception as error:  # trimesh's readers raise errors of any class
        reason = one_line(error) or type(error).__name__
        raise MeshFileError(f"the {kind[1:]} file is damaged or holds no mesh ({reason})") from error
    if len(merged.faces) == 0:
        raise MeshFileError(f"the {kind[1:]} file holds no triangles")
    vertices, faces = np.asarray(merged.vertices, np.float32), np.asarray(merged.faces, np.int64)
    return Mesh(vertices, faces, area_weighted_normals(vertices, faces))


def turn_z_up(mesh: Mesh) -> Mesh:
    """Turn a mesh for programs whose Z points up: (x, y, z) becomes (x, -z, y)."""
    turned = (points[:, [0, 2, 1]] * np.array([1, -1, 1], np.float32) for points in (mesh.vertices, mesh.normals))
    vertices, normals = turned
    return Mesh(vertices, mesh.faces, normals)
