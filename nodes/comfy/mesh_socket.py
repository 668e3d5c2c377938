"""Core's MESH and FILE_3D sockets <-> d3ds2 meshes, in every supported version of ComfyUI.

A batch of unequal meshes is padded with zeros; `vertex_counts` and `face_counts` say how many rows are real. MESH takes
them as arguments since version 0.21. In older versions they are set as attributes, which our own nodes read.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
from comfy_api.latest import Types, io

from .progress import run_cancellable

if TYPE_CHECKING:
    from ...d3ds2.meshes.mesh import Mesh


FILES = ("FILE_3D", "FILE_3D_GLB", "FILE_3D_GLTF", "FILE_3D_OBJ", "FILE_3D_STL", "FILE_3D_PLY")


def mesh_input(tooltip: str) -> io.Input:
    """Return a socket for MESH and for 3D files. File types are given by name; not every version defines them all."""
    return io.MultiType.Input(io.Mesh.Input("mesh", tooltip=tooltip), types=[io.Custom(name) for name in FILES])


def fit_inputs(shell_tooltip: str) -> list[io.Input]:
    """Return the inputs that say how a mesh is put into the model's box and made solid."""
    return [
        io.Boolean.Input(
            "fit",
            default=True,
            tooltip="Centre the mesh and scale it to the model's box; the result returns to the mesh's own size and "
            "place. When off, the mesh must already lie in [-0.5, 0.5]³, as VAE Decode SDF gives it, and is not moved.",
        ),
        io.Float.Input("shell", default=0.55, min=0.5, max=4.0, step=0.05, tooltip=shell_tooltip, advanced=True),
    ]


def to_socket(meshes: list[Mesh]) -> Types.MESH:
    """Return meshes as one MESH: vertices (B, V, 3) float32, faces (B, F, 3) int64, normals (B, V, 3) float32."""
    known = inspect.signature(Types.MESH).parameters
    vertices, faces = _pad([mesh.vertices for mesh in meshes]), _pad([mesh.faces for mesh in meshes])
    extras = {"normals": _pad([mesh.normals for mesh in meshes])}
    if len({mesh.vertices.shape + mesh.faces.shape for mesh in meshes}) > 1:
        extras["vertex_counts"] = torch.tensor([len(mesh.vertices) for mesh in meshes])
        extras["face_counts"] = torch.tensor([len(mesh.faces) for mesh in meshes])
    socket = Types.MESH(vertices, faces, **{name: value for name, value in extras.items() if name in known})
    for name, value in extras.items():
        if name not in known:
            setattr(socket, name, value)
    return socket


def from_socket(socket: Types.MESH | Types.File3D) -> list[Mesh]:
    """Return the meshes of a MESH, or the one in a file. Missing normals are computed from the faces.

    Raises:
        ValueError: there is no mesh; a mesh has no faces, face indices out of range or coordinates that are not
            finite; a file cannot be read.
    """
    from ...d3ds2.meshes.mesh import Mesh, area_weighted_normals, seamless_normals
    from ...d3ds2.meshes.mesh_file import read_mesh
    from ...d3ds2.meshes.triangles import checked_faces, checked_vertices

    if socket is None:
        raise ValueError(
            "no mesh came in: Load 3D gives none while its model_file is `none`. Choose a file there, or connect a "
            "MESH."
        )
    if isinstance(socket, Types.File3D):
        return [run_cancellable(read_mesh, socket.get_data(), f".{socket.format}")]
    meshes = []
    for name in ("vertices", "faces"):
        rows = getattr(socket, name, None)
        if not isinstance(rows, torch.Tensor) or rows.ndim != 3 or rows.is_complex():
            found = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(f"expected a MESH with {name} (batch, rows, 3), got {found}")
    if len(socket.vertices) != len(socket.faces):
        raise ValueError(f"expected faces of all {len(socket.vertices)} meshes, got {len(socket.faces)}")
    normals_given = getattr(socket, "normals", None)
    for i in range(len(socket.vertices)):
        vertex_count, face_count = (_count(socket, name, i) for name in ("vertices", "faces"))
        vertices = _copy(socket.vertices[i][:vertex_count].float())
        faces = _copy(socket.faces[i][:face_count].long())
        which = f"mesh {i + 1} of {len(socket.vertices)}"
        if not len(vertices) or not len(faces):
            raise ValueError(f"{which} is empty: it has {len(vertices)} vertices and {len(faces)} faces")
        try:
            checked_faces(faces, len(checked_vertices(vertices)))
        except ValueError as error:
            raise ValueError(f"{which} is damaged: {error}") from None
        cut = getattr(socket, "uvs", None) is not None  # along the seams of its texture
        normals = (seamless_normals if cut else area_weighted_normals)(vertices, faces)
        if isinstance(normals_given, torch.Tensor) and normals_given.shape == socket.vertices.shape:
            given = _copy(normals_given[i][:vertex_count].float())
            normals = given if np.isfinite(given).all() else normals
        meshes.append(Mesh(vertices, faces, normals))
    if not meshes:
        raise ValueError("the batch of meshes is empty")
    return meshes


def _copy(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().copy()


def _count(socket: Types.MESH, name: str, index: int) -> int | None:
    """The rows of one mesh that are real: those of `vertices` or of `faces`."""
    counts = getattr(socket, {"vertices": "vertex_counts", "faces": "face_counts"}[name], None)
    if counts is None:
        return None
    if len(counts) <= index:
        raise ValueError(f"expected counts of the {name} of all {len(socket.vertices)} meshes, got {len(counts)}")
    count, rows = int(counts[index]), getattr(socket, name).shape[1]
    if not 0 <= count <= rows:
        raise ValueError(f"expected at most {rows} {name} in mesh {index + 1}, got {count}")
    return count


def _pad(arrays: list[np.ndarray]) -> torch.Tensor:
    padded = torch.zeros(len(arrays), max(map(len, arrays)), 3, dtype=torch.from_numpy(arrays[0][:0]).dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = torch.from_numpy(array)
    return padded
