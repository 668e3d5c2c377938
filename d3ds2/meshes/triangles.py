"""Arrays of vertices and faces, checked before a compiled loop reads them: it would read, and write, out of bounds.

Sizes:
    V  vertices     F  faces
"""

import numpy as np

FARTHEST = 1e30  # in float32, differences of coordinates must fit too


def checked_vertices(vertices: np.ndarray) -> np.ndarray:
    """Return vertices (V, 3) as float64.

    Raises:
        ValueError: they have another shape or kind, there are none, or some are not finite or too far away.
    """
    vertices = np.asarray(vertices)
    if vertices.dtype.kind not in "fiu":
        raise ValueError(f"expected vertices of real numbers, got {vertices.dtype}")
    vertices = vertices.astype(np.float64, copy=False)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not len(vertices):
        raise ValueError(f"expected vertices (V, 3) with V > 0, got {vertices.shape}")
    if not np.isfinite(vertices).all():
        raise ValueError(f"expected finite vertices, got {int((~np.isfinite(vertices)).any(1).sum())} that are not")
    if np.abs(vertices).max() > FARTHEST:
        raise ValueError(f"expected vertices up to {FARTHEST:g}, got {np.abs(vertices).max():g}")
    return vertices


def checked_faces(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """Return faces (F, 3) of so many vertices as int64.

    Raises:
        ValueError: they have another shape or no integers, there are none, or one has a vertex that does not exist.
    """
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or not len(faces) or not np.issubdtype(faces.dtype, np.integer):
        raise ValueError(f"expected integer faces (F, 3) with F > 0, got {faces.dtype} {faces.shape}")
    faces = faces.astype(np.int64, copy=False)
    if faces.min() < 0 or faces.max() >= num_vertices:
        raise ValueError(f"expected face indices in [0, {num_vertices}), got {faces.min()} to {faces.max()}")
    return faces


def used_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out vertices (V, 3) that no face (F, 3) has: one far away would make the mesh small in its box."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    if used.all():
        return vertices, faces
    return vertices[used], (np.cumsum(used) - 1)[faces]
