"""Scores of a mesh by which training data is chosen: whether it is closed, one object, thick enough, coloured.

Lengths are shares of the longest side of the bounding box. Random points on the surface, which many scores are means
over, follow from a fixed seed. `block_plates` looks at a generated mesh instead, in voxels of its SDF.

Sizes:
    V  vertices     F  faces     n  points
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError

from d3ds2.images.render import MeshRenderer
from d3ds2.images.srgb import to_bytes
from d3ds2.images.surface_colors import PLAIN, SurfaceColors
from d3ds2.meshes.block import BLOCK
from training.evaluation.metrics import connected_parts

WELD = 1e-5  # vertices nearer than this are one
THIN = 1 / 128  # as thick as two voxels of a grid of 256
CELLS = 32  # of the grid, along an edge, in which a gap separates pieces
SMALL_ISLAND = 0.01  # share of the area
SURFACE_POINTS, RAY_POINTS, DIRECTIONS = 60_000, 2_000, 16
GROUND_RAYS = 64  # along an edge
GROUND_HEIGHT = 0.05  # of the mesh's height
HULL_POINTS = 100_000
PLATE_AREA = BLOCK**2  # voxels²: the face of a block
PLATE_DEPTH = 0.05  # voxels that the corners of a plate may lie beside the border of blocks
SEED = 0


class Scores(NamedTuple):
    """The scores of a mesh; shares are in [0, 1]."""

    faces: int  # those with an area
    closed: float  # share of the edges with exactly two faces; 1: watertight
    wound: float  # share of those edges whose faces are wound alike; 1: inside and outside are known
    open_area: float  # share of the area that belongs to parts with an open edge
    parts: int  # pieces whose faces hang together by vertices
    islands: int  # pieces with a gap of about 1/32 between them, without those of less than 1 % of the area
    main: float  # share of the area in the largest island; well below 1: several objects
    ground: float  # share of the mesh, seen from above, and of its outline that is flat ground; large: a scene
    thin: float  # share of the area where the solid is thinner than 1/128; where inside is not known, gaps count too
    flat: float  # shortest side of the bounding box; near 0: a sheet, a picture
    hull: float  # area by that of the convex hull; well above 1: much detail, foliage, or insides
    hidden: float  # share of the area that cannot be seen from outside
    textured: float  # share of the area with a texture or with colours of vertices
    colors: float  # standard deviation of the colours in [0, 1], mean of the channels; 0: one colour


def score_mesh(vertices: np.ndarray, faces: np.ndarray, colors: SurfaceColors | np.ndarray | None = None) -> Scores:
    """Score a mesh: vertices (V,3), faces (F,3), and colours as `read_textured_mesh` gives them.

    Raises:
        ValueError: no face has an area.
        ImportError: embreex is not installed.
    """
    vertices, faces, kept = _welded(vertices, faces)
    if len(faces) == 0:
        raise ValueError("expected a face with an area, got none")
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(normals, axis=1) / 2
    points = _Points.draw(corners, areas)
    closed, wound, open_area, parts = _edges(vertices, faces, areas)
    islands, main = _islands(points.places)
    renderer = MeshRenderer(vertices, faces)
    is_known = wound > 0.99 and closed > 0.99
    inward = -np.sign(np.einsum("ij,ij->i", corners[:, 0], normals).sum()) if is_known else 0.0
    textured, spread = _colors(colors, kept[points.faces], points)
    return Scores(
        faces=len(faces),
        closed=closed,
        wound=wound,
        open_area=open_area,
        parts=parts,
        islands=islands,
        main=main,
        ground=_ground(renderer),
        thin=_thin(renderer, points, normals, inward),
        flat=float(np.ptp(vertices, axis=0).min()),
        hull=float(areas.sum() / _hull_area(vertices, points)),
        hidden=_hidden(renderer, points, normals),
        textured=textured,
        colors=spread,
    )


class BlockPlates(NamedTuple):
    """The flat regions of a surface that lie in borders between blocks."""

    count: int
    area: float  # of all, in voxels²


def block_plates(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> BlockPlates:
    """Count the flat regions that lie in a plane between blocks of 8³ voxels and are as large as a face of a block.

    Where blocks of a generated SDF are missing, the surface may follow their faces. An object's own flat side lies in
    such a plane only by chance, so the count says most beside that of the true mesh.

    Args:
        vertices: (V,3) floats in [-1,1]³, as `sdf_to_mesh` gives them.
        faces: (F,3) integers; faces hang together where they share a vertex.
        resolution: R, voxels per edge of the cube.
    """
    places = (np.asarray(vertices, np.float64) + 1) * (resolution / 2)  # voxel i reaches from i to i + 1
    areas = []
    for axis in range(3):
        height = places[:, axis]
        is_near = np.abs(height - np.round(height / BLOCK) * BLOCK) < PLATE_DEPTH
        flat = faces[is_near[faces].all(1) & (np.ptp(height[faces], axis=1) < 2 * PLATE_DEPTH)]
        region = connected_parts(len(places), flat)
        a, b, c = places[flat].transpose(1, 0, 2)
        areas.append(np.bincount(region[flat[:, 0]], np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2))
    plates = np.concatenate(areas)
    plates = plates[plates > PLATE_AREA * (1 - 1e-6)]
    return BlockPlates(len(plates), float(plates.sum()))


class _Points(NamedTuple):
    """Random points on the surface, as many on each unit of area."""

    places: np.ndarray  # (n,3)
    faces: np.ndarray  # (n,)
    u: np.ndarray  # (n,) barycentric coordinates of the second corner
    v: np.ndarray  # (n,) and of the third

    @classmethod
    def draw(cls, corners: np.ndarray, areas: np.ndarray) -> "_Points":
        rng = np.random.default_rng(SEED)
        sums = np.cumsum(areas)
        faces = np.minimum(np.searchsorted(sums, rng.uniform(0, sums[-1], SURFACE_POINTS)), len(areas) - 1)
        u, v = rng.random((2, SURFACE_POINTS))
        beyond = u + v > 1
        u, v = np.where(beyond, 1 - u, u), np.where(beyond, 1 - v, v)
        a, b, c = corners[faces].transpose(1, 0, 2)
        return cls(a + u[:, None] * (b - a) + v[:, None] * (c - a), faces, u, v)


def _welded(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre and scale a mesh, merge vertices in the same place, and leave out faces without area.

    Returns:
        Vertices (V,3) whose longest side is 1, faces (F,3), and the old number (F,) of each face.
    """
    used, inverse = np.unique(faces, return_inverse=True)
    vertices = vertices[used].astype(np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - (low + high) / 2) / max((high - low).max(), 1e-30)
    x, y, z = np.round((vertices + 0.5) / WELD).astype(np.int64).T
    side = round(1 / WELD) + 1
    _, first, number = np.unique((x * side + y) * side + z, return_index=True, return_inverse=True)
    vertices, faces = vertices[first], number[inverse.reshape(faces.shape)]
    corners = vertices[faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    kept = np.flatnonzero(area > WELD**2)
    return vertices, faces[kept], kept


def _edges(vertices: np.ndarray, faces: np.ndarray, areas: np.ndarray) -> tuple[float, float, float, int]:
    """Return the scores closed, wound, open_area and parts."""
    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    key = np.minimum(start, end).astype(np.int64) * len(vertices) + np.maximum(start, end)
    unique, edge, count = np.unique(key, return_inverse=True, return_counts=True)
    turns = np.bincount(edge.ravel(), np.where(start < end, 1, -1), minlength=len(unique))
    pairs = count == 2
    graph = coo_array((np.ones(len(unique)), (unique // len(vertices), unique % len(vertices))), (len(vertices),) * 2)
    _, part = connected_components(graph, directed=False)
    is_open = np.zeros(len(vertices), dtype=bool)
    is_open[part[unique[count == 1] // len(vertices)]] = True
    part_of_face = part[faces[:, 0]]
    open_area = areas[is_open[part_of_face]].sum() / areas.sum()
    wound = (turns[pairs] == 0).mean() if pairs.any() else 0.0
    return float(pairs.mean()), float(wound), float(open_area), len(np.unique(part_of_face))


def _islands(places: np.ndarray) -> tuple[int, float]:
    """Return the scores islands and main."""
    cells = np.clip(((places + 0.5) * CELLS).astype(int), 0, CELLS - 1)
    grid = np.zeros((CELLS,) * 3, dtype=bool)
    grid[tuple(cells.T)] = True
    labels, _ = ndimage.label(grid, np.ones((3, 3, 3)))
    shares = np.bincount(labels[tuple(cells.T)]) / len(places)
    return int((shares >= SMALL_ISLAND).sum()), float(shares.max())


def _cast(renderer: MeshRenderer, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the face (n,) that each ray hits, or -1, and the distance (n,) in lengths of its direction."""
    hits = renderer.scene.run(origins.astype(np.float32), directions.astype(np.float32), output=1)
    return hits["primID"], np.where(hits["primID"] >= 0, hits["tfar"], np.inf)


def _rays_from(points: _Points, normals: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Return origins (n,3) just off the first points, on one side of their faces, and the unit normals there."""
    normal = normals[points.faces[:RAY_POINTS]]
    normal = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return points.places[:RAY_POINTS] + normal * (side * WELD), normal


def _thin(renderer: MeshRenderer, points: _Points, normals: np.ndarray, inward: float) -> float:
    """Return the score thin. `inward` is the side of the faces on which the solid is, 0 if it is not known."""
    nearest = np.full(RAY_POINTS, np.inf)
    for side in (inward,) if inward else (1.0, -1.0):
        origins, normal = _rays_from(points, normals, side)
        nearest = np.minimum(nearest, _cast(renderer, origins, normal * side)[1])
    return float((nearest < THIN).mean())


def _hidden(renderer: MeshRenderer, points: _Points, normals: np.ndarray) -> float:
    """Return the score hidden: from a point that is not, one of several random rays leaves the mesh."""
    rng = np.random.default_rng(SEED)
    is_hidden = np.ones(RAY_POINTS, dtype=bool)
    for side in (1.0, -1.0):
        origins, normal = _rays_from(points, normals, side)
        for _ in range(DIRECTIONS):
            left = np.flatnonzero(is_hidden)
            toward = rng.normal(size=(RAY_POINTS, 3))[left]
            toward /= np.linalg.norm(toward, axis=1, keepdims=True)
            toward += normal[left] * (side * 1.001)  # a hemisphere, denser about the normal
            is_hidden[left] = _cast(renderer, origins[left], toward)[0] >= 0
    return float(is_hidden.mean())


def _ground(renderer: MeshRenderer) -> float:
    """Return the score ground: what rays from above meet, along the outline of the mesh and within it."""
    (left, bottom, back), (right, top, front) = renderer.box
    place = (np.arange(GROUND_RAYS) + 0.5) / GROUND_RAYS
    x, z = np.meshgrid(left + (right - left) * place, back + (front - back) * place, indexing="ij")
    origins = np.stack([x.ravel(), np.full(x.size, top + 1), z.ravel()], axis=1)
    face, distance = _cast(renderer, origins, np.tile([0.0, -1.0, 0.0], (x.size, 1)))
    height = (top + 1 - distance - bottom) / max(top - bottom, 1e-30)
    corners = renderer.vertices[renderer.faces[face]].astype(np.float64)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    is_flat = np.abs(normal[:, 1]) > 0.98 * np.linalg.norm(normal, axis=1)
    is_hit = (face >= 0).reshape(x.shape)
    is_ground = ((face >= 0) & is_flat & (height < GROUND_HEIGHT)).reshape(x.shape)
    outline = is_hit & ~ndimage.binary_erosion(is_hit)
    return float(min(is_ground[outline].mean(), is_ground[is_hit].mean())) if outline.any() else 0.0


def _hull_area(vertices: np.ndarray, points: _Points) -> float:
    if len(vertices) > HULL_POINTS:
        vertices = points.places
    try:
        return ConvexHull(vertices).area
    except QhullError:  # all in one plane: the hull has two sides
        a, b, _ = np.sort(np.ptp(vertices, axis=0))[::-1]
        return float(2 * a * b)


def _colors(colors: SurfaceColors | np.ndarray | None, faces: np.ndarray, points: _Points) -> tuple[float, float]:
    """Return the scores textured and colors. `faces` (n,) are those of the points, as numbered in the colours."""
    if colors is None:
        return 0.0, 0.0
    if not isinstance(colors, SurfaceColors):
        return 0.0, float((colors[faces] / 255).std(axis=0).mean())
    varies = (colors.corners[faces] != colors.corners[faces][:, :1]).any(axis=(1, 2))
    linear = colors.linear(faces, points.u, points.v, np.ones(len(faces)))
    spread = (to_bytes(linear.clip(0, 1)) / 255).std(axis=0).mean()
    return float(((colors.texture[faces] != PLAIN) | varies).mean()), float(spread)
