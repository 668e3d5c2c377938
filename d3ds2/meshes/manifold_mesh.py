"""Triangle meshes whose sheets touch -> meshes in which every edge has two faces and every vertex one fan of faces.

When edges collapse, a closed, oriented mesh stays closed and oriented, but its sheets may meet: four faces at an edge,
two fans at a vertex, two faces back to back. The functions here take such sheets apart again.

Sizes:
    V  vertices     F  faces     H = 3 F  half-edges; half-edge 3 f + k runs from corner k of face f to the next
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NUDGE = 1e-3  # share of the way to its neighbours by which a doubled vertex moves, so that nothing welds it again


def separate_sheets(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take sheets apart where they share edges or vertices.

    Args:
        vertices: (V,3) floats.
        faces: (F,3) int64, closed and wound alike: along each edge as many faces run one way as the other.

    Returns:
        (vertices (V',3) float32, faces (F',3) int64): closed, every edge with two faces.
    """
    vertices, faces = np.asarray(vertices, np.float64), drop_back_to_back(np.asarray(faces, np.int64))
    while True:
        twins = pair_half_edges(vertices, faces)
        vertices, faces = one_vertex_per_fan(vertices, faces, twins)
        doubled = doubled_edges(faces, twins)
        if not len(doubled):
            return vertices.astype(np.float32), faces
        vertices, faces = split_edges(vertices, faces, twins, doubled)


def drop_back_to_back(faces: np.ndarray) -> np.ndarray:
    """Drop faces (F,3) with two equal corners, and pairs on the same three vertices that look opposite ways."""
    faces = faces[(faces != np.roll(faces, 1, 1)).all(1)]
    corners = np.sort(faces, 1)
    order = np.lexsort(corners.T)
    group = np.concatenate([[0], np.cumsum((corners[order[1:]] != corners[order[:-1]]).any(1))])
    turned = np.argmin(faces, 1)[:, None]
    ascending = np.take_along_axis(faces, (turned + 1) % 3, 1) < np.take_along_axis(faces, (turned + 2) % 3, 1)
    ascending = ascending[:, 0]
    kept = np.ones(len(faces), bool)
    for repeated in np.flatnonzero(np.bincount(group) > 1):
        same = order[group == repeated]
        one, other = same[ascending[same]], same[~ascending[same]]
        pairs = min(len(one), len(other))
        kept[one[:pairs]] = kept[other[:pairs]] = False
    return faces[kept]


def edge_keys(faces: np.ndarray) -> np.ndarray:
    """Return a number for the undirected edge of each half-edge of faces (F, 3): (H,), the same for both directions."""
    tail, head = faces.ravel(), np.roll(faces, -1, 1).ravel()
    return np.minimum(tail, head) * (faces.max() + 1) + np.maximum(tail, head)


def pair_half_edges(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the half-edge on the other side of each, (H,); -1 at an open edge. Vertices (V, 3), faces (F, 3).

    Where more than two faces meet at an edge, those with the same piece of the solid between them pair up.
    """
    order = np.argsort(edge_keys(faces), kind="stable")
    keys = edge_keys(faces)[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(starts, append=len(order))
    twins = np.full(len(order), -1)
    one, other = order[starts[counts == 2]], order[starts[counts == 2] + 1]
    twins[one], twins[other] = other, one
    tail = faces.ravel()
    for start, count in zip(starts[counts > 2], counts[counts > 2], strict=True):
        around = order[start : start + count]
        low, high = sorted((tail[around[0]], faces[around[0] // 3, (around[0] + 1) % 3]))
        axis = vertices[high] - vertices[low]
        axis /= max(np.linalg.norm(axis), 1e-300)
        arms = vertices[faces[around // 3, (around + 2) % 3]] - vertices[low]  # to the third corner
        arms -= (arms @ axis)[:, None] * axis
        first = arms[0] / max(np.linalg.norm(arms[0]), 1e-300)
        angle = np.arctan2(arms @ np.cross(axis, first), arms @ first)
        forward = list(np.flatnonzero(tail[around] == low))  # the solid lies clockwise of these
        backward = list(np.flatnonzero(tail[around] != low))
        wedges = sorted(((angle[i] - angle[j]) % (2 * np.pi), i, j) for i in forward for j in backward)
        for _, i, j in wedges:
            if twins[around[i]] < 0 and twins[around[j]] < 0:
                twins[around[i]], twins[around[j]] = around[j], around[i]
    return twins


def one_vertex_per_fan(vertices: np.ndarray, faces: np.ndarray, twins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give every fan of faces a vertex of its own, and drop vertices without faces.

    Args:
        vertices, faces: (V, 3) and (F, 3).
        twins: (H,), as `pair_half_edges` returns them.

    Returns:
        vertices (V', 3), faces (F, 3).
    """
    H = faces.size
    half_edges = np.arange(H)
    following = half_edges - half_edges % 3 + (half_edges + 1) % 3
    paired = half_edges[twins >= 0]
    links = np.concatenate([[paired, following[twins[paired]]], [following[paired], twins[paired]]], 1)
    _, fan = connected_components(coo_array((np.ones(links.shape[1], bool), links), shape=(H, H)), directed=False)
    _, first, corner = np.unique(fan, return_index=True, return_inverse=True)
    source = faces.ravel()[first]  # the vertex that each fan had
    order = np.argsort(source, kind="stable")  # keep the order of the vertices
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    source, faces = source[order], place[corner].reshape(-1, 3)
    made = vertices[source]
    for vertex in np.flatnonzero(np.bincount(source, minlength=len(vertices))[source] > 1):
        ring = np.setdiff1d(faces[(faces == vertex).any(1)], vertex)
        made[vertex] += NUDGE * (vertices[source[ring]].mean(0) - made[vertex])
    return made, faces


def doubled_edges(faces: np.ndarray, twins: np.ndarray) -> np.ndarray:
    """Return a half-edge of each pair whose two vertices are also joined by an earlier pair: (n,).

    Takes faces (F, 3) and twins (H,), as `pair_half_edges` returns them.
    """
    pairs = np.flatnonzero(np.arange(len(twins)) < twins)
    keys = edge_keys(faces)[pairs]
    _, first = np.unique(keys, return_index=True)
    return np.delete(pairs, first)


def split_edges(
    vertices: np.ndarray, faces: np.ndarray, twins: np.ndarray, half_edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put a vertex into the middle of the edges of `half_edges`; where several share a face, only into the first.

    Args:
        vertices, faces: (V, 3) and (F, 3).
        twins: (H,), as `pair_half_edges` returns them.
        half_edges: (n,), one of each pair.

    Returns:
        vertices (V + m, 3), faces (F + 2 m, 3) where m edges were split.
    """
    faces, added, touched = faces.copy(), [], set()
    points = [vertices]
    for half_edge in half_edges:
        pair = [(h // 3, h % 3) for h in (half_edge, twins[half_edge])]
        if touched & {f for f, _ in pair}:
            continue
        touched |= {f for f, _ in pair}
        middle = len(vertices) + len(points) - 1
        ends = [faces[pair[0][0], pair[0][1]], faces[pair[0][0], (pair[0][1] + 1) % 3]]
        thirds = [faces[f, (k + 2) % 3] for f, k in pair]
        centre = vertices[ends].mean(0)
        points.append((centre + NUDGE * (vertices[thirds].mean(0) - centre))[None])
        for f, k in pair:
            upper = faces[f].copy()
            upper[k] = middle
            added.append(upper)
            faces[f, (k + 1) % 3] = middle
    return np.concatenate(points), np.concatenate([faces, added])
