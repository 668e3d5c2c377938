"""Faces with any number of corners -> triangles. Concave polygons are cut by ear clipping (mapbox_earcut).

Sizes named in this file:
    V  vertices      P  polygons      F  triangles
"""

import numpy as np


def triangulate(vertices: np.ndarray, polygons: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cut polygons into triangles, with the same side outward and no new vertices.

    Args:
        vertices: (V, 3).
        polygons: the vertices of each, (n,) integers; one with fewer than three has no triangles.

    Returns:
        faces (F, 3) int64, as places in the polygons' vertices one after the other: 0, 1, … for the first polygon; and
        the polygon of each triangle, (F,) int64.

    Raises:
        ValueError: a polygon names a vertex that does not exist.
    """
    lengths = np.array([len(polygon) for polygon in polygons], dtype=np.int64)
    corners = np.concatenate([np.zeros(0, np.int64), *polygons]).astype(np.int64)
    if len(corners) and not 0 <= corners.min() <= corners.max() < len(vertices):
        raise ValueError(f"expected faces of vertices 0 to {len(vertices) - 1}, got {corners.min()} to {corners.max()}")
    starts = np.cumsum(lengths) - lengths
    points = np.asarray(vertices, np.float64)[corners]
    triangles, owners = [], []
    for length in np.unique(lengths[lengths >= 3]):
        here = np.flatnonzero(lengths == length)
        places = starts[here, None] + np.arange(length)  # (p, n)
        turned = _start_at_reflex(points[places])  # fans from there
        cut = (np.arange(length) + turned[:, None]) % length
        fan = np.stack([np.zeros(length - 2, int), np.arange(1, length - 1), np.arange(2, length)], axis=1)
        fans = np.take_along_axis(places, cut, axis=1)[:, fan]  # (p, n - 2, 3)
        triangles.append(fans.reshape(-1, 3))
        owners.append(here.repeat(length - 2))
        if length > 4:
            folded = here[_is_folded(points[fans])]
            keep = ~np.isin(owners[-1], folded)
            triangles[-1], owners[-1] = triangles[-1][keep], owners[-1][keep]
            for polygon in folded.tolist():
                own = starts[polygon] + _clip_ears(points[starts[polygon] : starts[polygon] + length])
                triangles.append(own)
                owners.append(np.full(len(own), polygon))
    faces = np.concatenate([np.zeros((0, 3), np.int64), *triangles])
    owner = np.concatenate([np.zeros(0, np.int64), *owners])
    order = owner.argsort(kind="stable")
    return faces[order], owner[order]


def _normals(points: np.ndarray) -> np.ndarray:
    """Newell's normals of polygons (p, n, 3): (p, 3), twice the area long."""
    return np.cross(points - points[:, :1], np.roll(points, -1, axis=1) - points[:, :1]).sum(1)


def _start_at_reflex(points: np.ndarray) -> np.ndarray:
    """The corner from which a fan covers each polygon (p, n, 3), if one does: the most reflex one, else 0; (p,)."""
    before, after = points - np.roll(points, 1, axis=1), np.roll(points, -1, axis=1) - points
    turns = (np.cross(before, after) * _normals(points)[:, None]).sum(-1)  # negative at a reflex corner
    return np.where((turns < 0).any(1), turns.argmin(1), 0)


def _is_folded(fans: np.ndarray) -> np.ndarray:
    """Whether triangles (p, f, 3, 3) of each fan show different sides, so that they overlap: (p,)."""
    normals = np.cross(fans[:, :, 1] - fans[:, :, 0], fans[:, :, 2] - fans[:, :, 0])  # (p, f, 3)
    return ((normals * normals.sum(1, keepdims=True)).sum(-1) < 0).any(1)


def _clip_ears(points: np.ndarray) -> np.ndarray:
    """Triangles (f, 3) of a polygon (n, 3), seen along its normal."""
    import mapbox_earcut

    normal = _normals(points[None])[0]
    axis = int(np.abs(normal).argmax())
    across = [(axis + 1) % 3, (axis + 2) % 3]
    flat = np.ascontiguousarray(points[:, across if normal[axis] > 0 else across[::-1]])
    cut = mapbox_earcut.triangulate_float64(flat, np.array([len(flat)], np.uint32)).reshape(-1, 3).astype(np.int64)
    a, b, c = (flat[cut[:, k]] for k in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    return np.where((area < 0)[:, None], cut[:, ::-1], cut)
