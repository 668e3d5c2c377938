"""Chamfer distance, F-score, volume IoU, watertightness and shells of surfaces.

All lengths are in units of the cube [-1,1]³; a voxel of a grid with resolution R has edge 2/R. Distances go from sample
points to the triangles themselves, so identical surfaces have distance 0 with however few samples.

Sizes:
    V  vertices     F  faces     n  points     k  candidate triangles of a point
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from d3ds2.meshes.numba_kernel import kernel
from d3ds2.meshes.triangle_distance import nearest

SPACING = 0.01  # between candidate points on large triangles
NEAR = 0.03  # closer than this, the nearest CANDIDATES points are tried; farther, all those of the nearest CELLS
CANDIDATES = 12
CELL, CELLS = 0.03, 6  # edge of a cell; number of cells
COLUMNS = 64  # along x and along y, for finding triangles
COLUMN_OFFSET = (1.37e-7, -0.71e-7)  # in x and y: keeps columns off vertices and edges on grid planes


class Surface:
    """A triangle mesh prepared for comparison.

    Args:
        vertices, faces: (V,3) in [-1,1], (F,3).
        num_points: number of points sampled uniformly over the area.
        seed: of the sampling.

    Raises:
        ValueError: the mesh has no area.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, num_points: int = 20_000, seed: int = 0):
        self.triangles = np.asarray(vertices, dtype=np.float64)[faces]  # (F,3,3)
        edges = self.triangles[:, 1:] - self.triangles[:, :1]
        self.areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
        if not self.areas.sum() > 0:
            raise ValueError(f"expected a surface, got {len(faces)} faces of no area")
        rng = np.random.default_rng(seed)
        self.points = self._on_faces(rng.choice(len(faces), num_points, p=self.areas / self.areas.sum()), rng)
        repeats = np.ceil(self.areas / SPACING**2).astype(np.int64) - 1  # besides the centre
        extra = np.arange(len(faces)).repeat(repeats.clip(0))
        self._face_of_candidate = np.concatenate([np.arange(len(faces)), extra])
        candidates = np.concatenate([self.triangles.mean(axis=1), self._on_faces(extra, rng)])
        self._tree = cKDTree(candidates)
        place = np.floor(candidates / CELL).astype(np.int64)
        place -= place.min(axis=0)
        size = place.max(axis=0) + 1
        key = (place[:, 0] * size[1] + place[:, 1]) * size[2] + place[:, 2]
        order = key.argsort(kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        counts = np.diff(starts, append=len(order))
        self._cells = cKDTree(np.add.reduceat(candidates[order], starts) / counts[:, None])  # the mean of each
        self._offsets = np.concatenate([[0], counts.cumsum()])
        self._face_in_cell = self._face_of_candidate[order]

    def _on_faces(self, faces: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a uniformly random point on each of n faces: (n,3)."""
        u, v = rng.random((2, len(faces), 1))
        u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
        a, b, c = self.triangles[faces].transpose(1, 0, 2)
        return a + u * (b - a) + v * (c - a)

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Measure the distance (n,) of points (n,3) to the nearest triangle."""
        points = np.ascontiguousarray(points, dtype=np.float64)
        # for far points, a search for many neighbours would visit much of the tree
        _, index = self._tree.query(points, CANDIDATES, distance_upper_bound=NEAR)
        out = _distance_to_candidates(points, index, self._face_of_candidate, self.triangles)
        far = np.flatnonzero(index[:, 0] == len(self._face_of_candidate))
        _, cells = self._cells.query(points[far], CELLS)
        out[far] = _distance_to_cells(points[far], cells, self._offsets, self._face_in_cell, self.triangles)
        return out


@kernel
def _distance_to_candidates(points, index, face_of_candidate, triangles):
    """Measure (n,) from each point to the nearest triangle of its own candidates (n,k); inf if it has none."""
    out = np.full(len(points), np.inf)
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        for candidate in index[i]:
            if candidate < len(face_of_candidate):
                a, b, c = nearest(x, y, z, triangles[face_of_candidate[candidate]])
                out[i] = min(out[i], (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2)
    return np.sqrt(out)


@kernel
def _distance_to_cells(points, cells, offsets, face_in_cell, triangles):
    """Measure (n,) from each point to the nearest triangle in its own cells (n,k)."""
    out = np.full(len(points), np.inf)
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        for cell in cells[i]:
            if cell < len(offsets) - 1:
                for member in range(offsets[cell], offsets[cell + 1]):
                    a, b, c = nearest(x, y, z, triangles[face_in_cell[member]])
                    out[i] = min(out[i], (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2)
    return np.sqrt(out)


class FScore(NamedTuple):
    """The shares of two surfaces that lie within a threshold of each other, in [0, 1]."""

    precision: float  # of the result
    recall: float  # of the truth
    f1: float  # their harmonic mean


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces, from the samples of each to the triangles of the other."""

    to_truth: np.ndarray  # (n,) from the result's points
    to_result: np.ndarray  # (n,) from the truth's points

    @classmethod
    def between(cls, result: Surface, truth: Surface) -> "SurfaceDistances":
        return cls(truth.distance(result.points), result.distance(truth.points))

    @property
    def chamfer(self) -> float:
        """The chamfer distance (CD): the mean distance, averaged over both directions."""
        return float(self.to_truth.mean() + self.to_result.mean()) / 2

    def f_score(self, threshold: float) -> FScore:
        """Score the samples that lie within `threshold` of the other surface, in units of the cube [-1,1]³."""
        precision, recall = (self.to_truth <= threshold).mean(), (self.to_result <= threshold).mean()
        return FScore(float(precision), float(recall), float(2 * precision * recall / max(precision + recall, 1e-12)))


def solid_grid(vertices: np.ndarray, faces: np.ndarray, cells: int) -> np.ndarray:
    """Find the cell centres of the cube inside a closed mesh oriented outward: (cells, cells, cells) bool, [x,y,z].

    The mesh has vertices (V, 3) in [-1,1]³ and faces (F, 3). Inside means a positive winding number, counted along z.
    """
    change = np.zeros((cells, cells, cells + 1), dtype=np.int16)
    _add_crossings(np.asarray(vertices, dtype=np.float64)[faces], cells, change)
    return np.cumsum(change[..., :cells], axis=2, dtype=np.int16) > 0


@kernel
def _add_crossings(triangles, cells, change):
    """Add +1 (entering) or -1 (leaving) to the first centre behind each crossing of a column and a triangle."""
    for f in range(len(triangles)):
        grid = (triangles[f] + 1.0) * (0.5 * cells) - 0.5  # centres at integers
        grid[:, 0] += COLUMN_OFFSET[0]
        grid[:, 1] += COLUMN_OFFSET[1]
        ax, ay, bx, by, cx, cy = grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1], grid[2, 0], grid[2, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0.0:
            continue
        sign = -1 if area > 0 else 1  # a normal toward +z is where the column leaves the solid
        for x in range(max(0, int(np.ceil(min(ax, bx, cx)))), min(cells - 1, int(np.floor(max(ax, bx, cx)))) + 1):
            for y in range(max(0, int(np.ceil(min(ay, by, cy)))), min(cells - 1, int(np.floor(max(ay, by, cy)))) + 1):
                u = ((bx - x) * (cy - y) - (by - y) * (cx - x)) / area
                v = ((cx - x) * (ay - y) - (cy - y) * (ax - x)) / area
                w = ((ax - x) * (by - y) - (ay - y) * (bx - x)) / area
                if u >= 0 and v >= 0 and w >= 0:
                    z = u * grid[0, 2] + v * grid[1, 2] + w * grid[2, 2]
                    change[x, y, min(max(int(np.ceil(z)), 0), cells)] += sign


def volume_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boolean grids (G, G, G); 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def is_watertight(faces: np.ndarray) -> bool:
    """Whether every edge of faces (F,3) belongs to exactly two of them, which run along it in opposite directions."""
    if len(faces) == 0:
        return False
    start, end = faces[:, [0, 1, 2]].ravel().astype(np.int64), faces[:, [1, 2, 0]].ravel().astype(np.int64)
    size = int(faces.max()) + 1
    along, against = np.sort(start * size + end), np.sort(end * size + start)
    return bool((along == against).all() and (np.diff(along) > 0).all())


def connected_parts(number: int, faces: np.ndarray) -> np.ndarray:
    """Label the connected part of each of `number` vertices, (V,) int32; a vertex without faces is a part."""
    edges = coo_array((np.ones(2 * len(faces)), (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel())), (number,) * 2)
    return connected_components(edges, directed=False)[1]


def count_shells(vertices: np.ndarray, faces: np.ndarray) -> tuple[int, int]:
    """Count the connected parts of a closed mesh that are visible from outside, and those that are not: (outer, inner).

    The mesh has vertices (V, 3) and faces (F, 3). Inner parts are turned inside out (cavities) or enclosed by another
    part.
    """
    if len(faces) == 0:
        return 0, 0
    vertices = np.asarray(vertices, dtype=np.float64)
    label_of_vertex = connected_parts(len(vertices), faces)
    _, label = np.unique(label_of_vertex[faces[:, 0]], return_inverse=True)  # (F,); vertices without faces are no part
    triangles = vertices[faces]
    volume = np.bincount(label, np.einsum("fi,fi->f", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])))
    order = np.lexsort((triangles[:, :, 2].max(axis=1), label))
    last = np.append(np.flatnonzero(np.diff(label[order])), len(order) - 1)  # the highest triangle of each part
    top_triangles = triangles[order[last]]
    tops = top_triangles[np.arange(len(last)), top_triangles[:, :, 2].argmax(axis=1)]
    inner = int(np.count_nonzero((volume < 0) | _enclosed(tops, triangles, label, *_columns(triangles))))
    return len(volume) - inner, inner


def _columns(triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort triangles into the columns along z that they reach.

    Returns:
        box (2,2): the corner of all columns in x and y, and the size of one.
        offsets (COLUMNS² + 1,): where the triangles of each column begin in `members`.
        members: indices of triangles.
    """
    low, high = triangles[..., :2].min(axis=(0, 1)), triangles[..., :2].max(axis=(0, 1))
    box = np.stack([low, np.maximum(high - low, 1e-12) / COLUMNS])
    places = (triangles[..., :2] - box[0]) / box[1]
    first = np.clip(np.floor(places.min(axis=1) - 1e-3), 0, COLUMNS - 1).astype(np.int64)
    last = np.clip(np.floor(places.max(axis=1) + 1e-3), 0, COLUMNS - 1).astype(np.int64)
    offsets = np.zeros(COLUMNS**2 + 1, dtype=np.int64)
    _fill_columns(first, last, offsets, np.zeros(0, dtype=np.int64))  # counts
    offsets = np.concatenate([[0], offsets[:-1].cumsum()])
    members = np.empty(offsets[-1], dtype=np.int64)
    _fill_columns(first, last, offsets.copy(), members)
    return box, offsets, members


@kernel
def _fill_columns(first, last, cursor, members):
    """Advance the cursor of each column by its triangles; write these to `members`, unless it is empty."""
    for f in range(len(first)):
        for x in range(first[f, 0], last[f, 0] + 1):
            for y in range(first[f, 1], last[f, 1] + 1):
                column = x * COLUMNS + y
                if members.size > 0:
                    members[cursor[column]] = f
                cursor[column] += 1


@kernel
def _enclosed(tops, triangles, label, box, offsets, members):
    """Find the parts whose highest point has a nonzero winding number in another part: (parts,) bool."""
    parts = len(tops)
    out = np.zeros(parts, dtype=np.bool_)
    winding = np.zeros(parts, dtype=np.int64)
    for part in range(parts):
        x, y, z = tops[part, 0] + COLUMN_OFFSET[0], tops[part, 1] + COLUMN_OFFSET[1], tops[part, 2]
        column_x = min(max(int((x - box[0, 0]) / box[1, 0]), 0), COLUMNS - 1)
        column_y = min(max(int((y - box[0, 1]) / box[1, 1]), 0), COLUMNS - 1)
        column = column_x * COLUMNS + column_y
        above = members[offsets[column] : offsets[column + 1]]
        for f in above:
            a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
            area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
            if label[f] == part or area == 0.0 or max(a[2], b[2], c[2]) < z:
                continue
            u = ((b[0] - x) * (c[1] - y) - (b[1] - y) * (c[0] - x)) / area
            v = ((c[0] - x) * (a[1] - y) - (c[1] - y) * (a[0] - x)) / area
            w = ((a[0] - x) * (b[1] - y) - (a[1] - y) * (b[0] - x)) / area
            if u >= 0 and v >= 0 and w >= 0 and u * a[2] + v * b[2] + w * c[2] > z:
                winding[label[f]] += 1 if area > 0 else -1
        for f in above:
            out[part] = out[part] or winding[label[f]] != 0
            winding[label[f]] = 0
    return out
