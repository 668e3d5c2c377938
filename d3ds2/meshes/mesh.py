"""A triangle mesh: its normals, its connected parts, and its simplification.

Sizes:
    V  vertices     F  faces
"""

from dataclasses import dataclass

import numpy as np

from .manifold_mesh import separate_sheets
from .numba_kernel import kernel

MAX_VOLUME_CHANGE = 0.05  # of the volume, by simplifying
AGGRESSIVENESS = (7, 8, 9, 10)  # of fast-simplification, whose own default is the first


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh.

    Attributes:
        vertices: (V,3) float32; in [-1,1]³ as the pipeline makes them, elsewhere once placed or scaled for a file.
        faces: (F,3) int64, counter-clockwise seen from outside.
        normals: (V,3) float32, unit length, outward.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray


def area_weighted_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return unit normals (V,3) float32 of vertices (V,3) in faces (F,3), where larger faces weigh more.

    The normal is (0,0,1) where those of the faces cancel.
    """
    normals = np.zeros((len(vertices), 3))
    add_face_normals(vertices, faces, normals)
    lengths = np.linalg.norm(normals, axis=1)
    normals[lengths == 0.0] = (0.0, 0.0, 1.0)
    lengths[lengths == 0.0] = 1.0
    return (normals / lengths[:, None]).astype(np.float32)


def seamless_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return `area_weighted_normals`, the same for all vertices in one place: those along a seam of a texture."""
    places, same = np.unique(vertices, axis=0, return_inverse=True)
    return area_weighted_normals(places, same.reshape(-1)[faces])[same.reshape(-1)]


@kernel
def add_face_normals(vertices, faces, normals):
    """Add twice the area vector of each face to the rows of its three vertices in normals (V,3)."""
    for f in range(faces.shape[0]):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = float(b[0]) - a[0], float(b[1]) - a[1], float(b[2]) - a[2]
        vx, vy, vz = float(c[0]) - a[0], float(c[1]) - a[1], float(c[2]) - a[2]
        for corner in range(3):
            normals[faces[f, corner], 0] += uy * vz - uz * vy
            normals[faces[f, corner], 1] += uz * vx - ux * vz
            normals[faces[f, corner], 2] += ux * vy - uy * vx


@kernel
def label_parts(faces, parent):
    """Turn parent (V,), in which each vertex is its own, into the first vertex of its connected part."""
    for f in range(faces.shape[0]):
        a = faces[f, 0]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        for corner in range(1, 3):
            b = faces[f, corner]
            while parent[b] != b:
                parent[b] = parent[parent[b]]
                b = parent[b]
            a, b = min(a, b), max(a, b)
            parent[b] = a
    for v in range(parent.size):
        parent[v] = parent[parent[v]]  # a parent has a lower index, so its own is final already


def drop_parts(mesh: Mesh, min_component: float = 0.0, keep_largest: bool = False) -> Mesh:
    """Return a mesh without the connected parts that are too small.

    Args:
        min_component: drop parts with fewer faces than this; below 1, a share of the largest part's faces.
        keep_largest: drop all parts but the one with the most faces.

    Raises:
        ValueError: min_component is larger than every part.
    """
    part = np.arange(len(mesh.vertices))
    label_parts(mesh.faces, part)
    if (part == part[0]).all() and min_component <= len(mesh.faces):
        return mesh  # it has one part
    part_of_face = part[mesh.faces[:, 0]]
    sizes = np.bincount(part_of_face, minlength=len(part))  # faces, at each part's first vertex
    largest = int(sizes.argmax())
    if keep_largest:
        kept = np.arange(len(part)) == largest
    else:
        kept = sizes >= (min_component * sizes[largest] if min_component < 1.0 else min_component)
    kept_vertices = kept[part]
    if not kept_vertices.any():
        raise ValueError(f"expected min_component of at most the largest part, {sizes[largest]}, got {min_component}")
    renumbered = np.cumsum(kept_vertices) - 1
    faces = renumbered[mesh.faces[kept[part_of_face]]]
    return Mesh(mesh.vertices[kept_vertices], faces, mesh.normals[kept_vertices])


def decimate(mesh: Mesh, target_faces: int) -> Mesh:
    """Simplify a mesh to about `target_faces` faces by quadric errors; return it unchanged if it has no more.

    A closed mesh stays closed. The result has more faces than asked for if each handle of the mesh needs some, or if
    fewer would change the volume by more than MAX_VOLUME_CHANGE.

    Raises:
        ValueError: target_faces is below 4.
        ImportError: fast-simplification is not installed.
    """
    if target_faces < 4:
        raise ValueError(f"expected target_faces of at least 4, got {target_faces}")
    before = volume(mesh.vertices, mesh.faces)
    while target_faces < len(mesh.faces):
        vertices, faces = separate_sheets(*_simplify(mesh, target_faces))
        if abs(volume(vertices, faces) - before) <= MAX_VOLUME_CHANGE * abs(before):
            return Mesh(vertices, faces, area_weighted_normals(vertices, faces))
        target_faces *= 2
    return mesh


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Return the volume inside vertices (V,3) and faces (F,3), negative where they are wound inward.

    Of an open mesh, the volume below its faces as seen from its centre.
    """
    if len(faces) == 0:
        return 0.0
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) - vertices.mean(0) for corner in range(3))
    return float(np.einsum("nk,nk->", a, np.cross(b, c)) / 6)


def _simplify(mesh: Mesh, target_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V,3) and faces (F,3), simplified ever more boldly until there are as few as asked for."""
    try:
        import fast_simplification  # optional: making a mesh does not need it
    except ImportError as error:
        raise ImportError("decimate needs fast-simplification: pip install fast-simplification") from error
    vertices, faces = mesh.vertices, mesh.faces.astype(np.int32)
    for aggressiveness in AGGRESSIVENESS:
        vertices, faces = fast_simplification.simplify(vertices, faces, target_count=target_faces, agg=aggressiveness)
        if len(faces) <= target_faces:
            break
    return vertices, faces
