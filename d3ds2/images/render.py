"""Render a mesh from a camera: primary rays traced by embree on the CPU, without a display.

The picture depends on the arguments alone. Y is up, and the object's front looks toward +Z. Triangles have two sides:
a normal that points away from the camera is reversed.

Sizes:
    V  vertices     F  faces
"""

import math
from dataclasses import dataclass

import numpy as np

from .srgb import to_bytes, to_linear
from .surface_colors import SurfaceColors

SENSOR_MM = 36.0  # edge of the square sensor
GREY = 200  # sRGB albedo of a mesh without colours
SHADOW_OFFSET = 1e-4  # of the bounding sphere's radius
WHITE = (1.0, 1.0, 1.0)
EDGE_CONTRAST = 0.03  # pixels that differ from a neighbour by more, summed over linear RGBA, are sampled again


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a sphere around its target, upright.

    At azimuth 0 the camera is on the object's +Z side; it moves toward +X as azimuth grows, and toward +Y as elevation
    grows (both in degrees). Its distance lets a sphere of `radius` around `target` just fit into the square picture.
    """

    elevation: float = 15.0
    azimuth: float = 0.0
    focal_mm: float = 50.0  # for a sensor of 36 mm
    target: tuple[float, float, float] | None = None  # None: the centre of the mesh's bounding box
    radius: float | None = None  # None: the largest distance of a vertex from the target

    def __post_init__(self):
        if not self.focal_mm > 0:
            raise ValueError(f"expected focal_mm > 0, got {self.focal_mm}")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"expected radius > 0, got {self.radius}")

    @property
    def axes(self) -> np.ndarray:
        """The unit vectors right, up and backward (from the target to the camera), (3,3) float32."""
        backward = direction(self.elevation, self.azimuth)
        azimuth = math.radians(self.azimuth)
        right = np.array([math.cos(azimuth), 0.0, -math.sin(azimuth)])
        return np.stack([right, np.cross(backward, right), backward]).astype(np.float32)

    @property
    def half_width(self) -> float:
        """Half the picture's width at distance 1: tan of half the field of view."""
        return SENSOR_MM / 2 / self.focal_mm

    @property
    def distance(self) -> float:
        """The distance from target to camera in radii: 1 / sin of half the field of view."""
        return math.hypot(1.0, self.half_width) / self.half_width


@dataclass(frozen=True)
class Light:
    """A sky and a ground, a distant key light, and a weak light at the camera. Intensities are linear, white = 1."""

    elevation: float = 50.0  # of the key light, in degrees as for the camera
    azimuth: float = -35.0
    key: float = 0.75
    fill: float = 0.12
    sky: float = 0.35
    ground: float = 0.15
    shadows: bool = False
    key_color: tuple[float, float, float] = WHITE  # linear RGB, which the key light is multiplied by
    ambient_color: tuple[float, float, float] = WHITE  # likewise for all other light


def direction(elevation: float, azimuth: float) -> np.ndarray:
    """Return the unit vector (3,) float32 of angles in degrees: (0, 0) is +Z, azimuth 90 is +X, elevation 90 is +Y."""
    e, a = math.radians(elevation), math.radians(azimuth)
    return np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)], dtype=np.float32)


def _embree():
    try:
        from embreex import mesh_construction, rtcore_scene
    except ImportError as error:
        raise ImportError(
            "rendering needs embreex, which is not installed: pip install embreex "
            "(or this package's extra `train`: pip install -e .[train])"
        ) from error
    return rtcore_scene.EmbreeScene, mesh_construction.TriangleMesh


class MeshRenderer:
    """A mesh to be seen from any number of cameras: the tree for ray tracing is built once.

    Args:
        vertices: (V,3) floats.
        faces: (F,3) integers.
        face_colors: (F,3) or (1,3) uint8 sRGB; None for grey.
        smooth: shade with area-weighted vertex normals; the faces must be wound alike.

    Raises:
        ImportError: embreex is not installed.
        ValueError: the shapes or values do not make a mesh.
    """

    def __init__(self, vertices, faces, face_colors=None, smooth: bool = False):
        scene, triangle_mesh = _embree()
        self.vertices = np.ascontiguousarray(vertices, dtype=np.float32)
        self.faces = np.ascontiguousarray(faces, dtype=np.int32)
        if self.vertices.ndim != 2 or self.vertices.shape[1] != 3 or not np.isfinite(self.vertices).all():
            raise ValueError(f"expected finite vertices (V,3), got {self.vertices.shape}")
        if self.faces.ndim != 2 or self.faces.shape[1] != 3 or len(self.faces) == 0:
            raise ValueError(f"expected faces (F,3) with F > 0, got {self.faces.shape}")
        if self.faces.min() < 0 or self.faces.max() >= len(self.vertices):
            raise ValueError(f"expected face indices below {len(self.vertices)}, got {self.faces.max()}")
        self.set_colors(np.full((1, 3), GREY) if face_colors is None else face_colors)
        self.normals = vertex_normals(self.vertices, self.faces) if smooth else None  # (V,3)
        self.box = np.stack([self.vertices.min(axis=0), self.vertices.max(axis=0)])  # (2,3)
        self.scene = scene(robust=True)
        triangle_mesh(self.scene, self.vertices, self.faces)

    def set_colors(self, face_colors) -> None:
        """Colour the faces: (F,3) uint8 sRGB, or (1,3) for all of them. Raises ValueError for another shape."""
        colors = np.asarray(face_colors, dtype=np.uint8)
        if colors.shape not in (self.faces.shape, (1, 3)):
            raise ValueError(f"expected face_colors {self.faces.shape} or (1, 3), got {colors.shape}")
        self.albedo = to_linear(colors)  # (F,3) or (1,3)
        self.surface = None

    def set_surface(self, surface: SurfaceColors, gain=WHITE) -> None:
        """Colour each point of the faces; a linear gain (3,) multiplies the channels.

        Raises:
            ValueError: the surface has another number of faces.
        """
        if len(surface.corners) != len(self.faces):
            raise ValueError(f"expected colours of {len(self.faces)} faces, got {len(surface.corners)}")
        if surface is not self.surface:
            self.surface, self.texels = surface, surface.texels(self.vertices, self.faces)
        self.gain = np.asarray(gain, dtype=np.float32)

    def render(self, camera: Camera, size: int, light: Light | None = None, supersample: int = 1) -> np.ndarray:
        """Render one view: (size, size, 4) uint8 sRGB with straight alpha, row 0 at the top.

        Args:
            size: pixels per edge.
            light: None for the default one.
            supersample: rays along a pixel's edge, for pixels that differ from a neighbour.

        Raises:
            ValueError: size or supersample is below 1.
        """
        if size < 1 or supersample < 1:
            raise ValueError(f"expected size and supersample >= 1, got {size} and {supersample}")
        view = self._view(camera, size, light or Light())
        picture = np.zeros((size, size, 4), dtype=np.float32)  # linear, premultiplied
        top, bottom, left, right = self._window(view)
        rows, columns = np.mgrid[top:bottom, left:right].reshape(2, -1)
        picture[top:bottom, left:right] = self._shade(view, rows + 0.5, columns + 0.5).reshape(
            bottom - top, right - left, 4
        )
        if supersample > 1:
            rows, columns = np.nonzero(_edges(picture[top:bottom, left:right]))
            rows, columns = rows + top, columns + left
            places = (np.arange(supersample) + 0.5) / supersample
            down, across = (a.ravel() for a in np.meshgrid(places, places, indexing="ij"))
            samples = self._shade(view, (rows[:, None] + down).ravel(), (columns[:, None] + across).ravel())
            picture[rows, columns] = samples.reshape(len(rows), supersample**2, 4).mean(axis=1)
        return _encode(picture)

    def depth_and_normals(self, camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what is seen through the centre of each pixel, row 0 at the top.

        Args:
            size: pixels per edge.

        Returns:
            The distances (size, size) float32 from the camera's plane, in the mesh's units, infinite beside the mesh;
            and unit normals (size, size, 3) float32 along the camera's right, up and backward axes, zero beside it.

        Raises:
            ValueError: the size is below 1.
        """
        if size < 1:
            raise ValueError(f"expected size >= 1, got {size}")
        view = self._view(camera, size, Light())
        depth, normals = np.full(size * size, np.inf, np.float32), np.zeros((size * size, 3), np.float32)
        rows, columns = np.mgrid[:size, :size].reshape(2, -1) + 0.5
        hits, hit, _, normal = self._trace(view, rows, columns)
        depth[hit] = hits["tfar"][hit]  # rays advance by 1 along the camera's axis
        normals[hit] = normal @ view.axes.T
        return depth.reshape(size, size), normals.reshape(size, size, 3)

    def points(self, camera: Camera, size: int) -> np.ndarray:
        """Return where the mesh is seen through the centre of each pixel, row 0 at the top.

        Args:
            size: pixels per edge.

        Returns:
            Coordinates (size, size, 3) float32 in those of the mesh, NaN beside it.

        Raises:
            ValueError: the size is below 1.
        """
        if size < 1:
            raise ValueError(f"expected size >= 1, got {size}")
        view = self._view(camera, size, Light())
        points = np.full((size, size, 3), np.nan, np.float32)
        top, bottom, left, right = self._window(view)
        rows, columns = np.mgrid[top:bottom, left:right].reshape(2, -1)
        hits, hit, rays, _ = self._trace(view, rows + 0.5, columns + 0.5)
        points[rows[hit], columns[hit]] = view.origin + rays * hits["tfar"][hit, None]
        return points

    def _window(self, view: "_View") -> tuple[int, int, int, int]:
        """Return the pixels that the mesh's bounding box can touch: top, bottom, left, right."""
        corners = np.stack(np.meshgrid(*self.box.T, indexing="ij"), axis=-1).reshape(8, 3)
        x, y, z = view.axes @ (corners - view.origin).T  # (8,) each; z < 0 in front of the camera
        if (z > -1e-6).any():
            return 0, view.size, 0, view.size
        column = (x / -z / view.half_width + 1) / 2 * view.size
        row = (1 - y / -z / view.half_width) / 2 * view.size
        low = np.floor([row.min(), column.min()]).astype(int) - 1
        high = np.ceil([row.max(), column.max()]).astype(int) + 1
        (top, left), (bottom, right) = np.clip([low, high], 0, view.size)
        return int(top), int(bottom), int(left), int(right)

    def _shade(self, view: "_View", rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return linear RGB and coverage (0 or 1), (n,4) float32, at positions (n,) in pixels."""
        out = np.zeros((len(rows), 4), dtype=np.float32)
        if len(rows) == 0:
            return out
        hits, hit, rays, normal = self._trace(view, rows, columns)
        if len(hit) == 0:
            return out
        face, light = hits["primID"][hit], view.light
        key = np.maximum(normal @ direction(light.elevation, light.azimuth), 0) * light.key
        if light.shadows:
            key *= self._lit(view, rays * hits["tfar"][hit, None], normal)
        camera = np.maximum(normal @ view.axes[2], 0) * light.fill
        ambient = (light.sky + light.ground) / 2 + normal[:, 1] * ((light.sky - light.ground) / 2)
        if all(channel == 1 for channel in (*light.key_color, *light.ambient_color)):
            intensity = (key + camera + ambient)[:, None]
        else:
            key_color, ambient_color = (np.array(c, np.float32) for c in (light.key_color, light.ambient_color))
            intensity = key[:, None] * key_color + (camera + ambient)[:, None] * ambient_color
        out[hit, :3] = self._albedo(view, hits, hit, face) * intensity
        out[hit, 3] = 1
        return out

    def _view(self, camera: Camera, size: int, light: Light) -> "_View":
        target = self.box.mean(axis=0) if camera.target is None else np.asarray(camera.target, dtype=np.float32)
        radius = camera.radius
        if radius is None:
            radius = float(np.sqrt(np.square(self.vertices - target).sum(axis=1).max())) or 1.0
        return _View(camera, target, radius, size, light)

    def _trace(self, view: "_View", rows: np.ndarray, columns: np.ndarray) -> tuple[dict, *tuple[np.ndarray, ...]]:
        """Trace rays through positions (n,) in pixels.

        Returns:
            Embree's table of hits, the places of those (k,) that hit, their rays and unit normals (k,3) float32; a
            normal that points away from the camera is reversed.
        """
        rays = view.rays(rows, columns)
        hits = self.scene.run(np.broadcast_to(view.origin, rays.shape).copy(), rays, output=1)
        hit = np.flatnonzero(hits["primID"] >= 0)
        face, rays = hits["primID"][hit], rays[hit]
        normal = hits["Ng"][hit]
        facing = np.einsum("ij,ij->i", normal, rays)
        if self.normals is not None:
            u, v = hits["u"][hit, None], hits["v"][hit, None]
            a, b, c = (self.normals[self.faces[face, k]] for k in range(3))
            normal = a + u * (b - a) + v * (c - a)
        scale = np.sqrt(np.einsum("ij,ij->i", normal, normal))
        normal *= (np.where(facing > 0, -1, 1) / np.maximum(scale, 1e-30)).astype(np.float32)[:, None]
        return hits, hit, rays, normal

    def _albedo(self, view: "_View", hits: dict, hit: np.ndarray, face: np.ndarray) -> np.ndarray:
        """Return the linear colours (n,3) or (1,3) of the points that were hit."""
        if self.surface is None:
            return self.albedo[face] if len(self.albedo) > 1 else self.albedo
        pixel = hits["tfar"][hit] * (2 * view.half_width / view.size)  # its width at the point
        colors = self.surface.linear(face, hits["u"][hit], hits["v"][hit], self.texels[face] * pixel)
        return colors * self.gain

    def _lit(self, view: "_View", offsets: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """Return 1 where the key light reaches the point at camera + offset (n,3), else 0; (n,) float32."""
        points = view.origin + offsets + normal * (SHADOW_OFFSET * view.radius)
        toward = np.broadcast_to(direction(view.light.elevation, view.light.azimuth), points.shape).copy()
        occluder = self.scene.run(points.astype(np.float32), toward, query="INTERSECT")
        return (occluder < 0).astype(np.float32)


class _View:
    """The position and axes of a camera in front of its target."""

    def __init__(self, camera: Camera, target: np.ndarray, radius: float, size: int, light: Light):
        self.axes, self.half_width, self.radius = camera.axes, camera.half_width, radius
        self.origin = (target + self.axes[2] * (camera.distance * radius)).astype(np.float32)
        self.size, self.light = size, light

    def rays(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return directions (n,3) float32, not normalised, through positions (n,) in pixels."""
        plane = np.empty((len(rows), 3), dtype=np.float32)
        plane[:, 0] = ((2 / self.size) * columns - 1) * self.half_width
        plane[:, 1] = (1 - (2 / self.size) * rows) * self.half_width
        plane[:, 2] = -1
        return plane @ self.axes


def render(
    vertices,
    faces,
    camera: Camera,
    size: int,
    face_colors=None,
    smooth: bool = False,
    light: Light | None = None,
    supersample: int = 1,
) -> np.ndarray:
    """Render one view of a mesh: (size, size, 4) uint8 sRGB with straight alpha.

    Arguments and errors as in `MeshRenderer` and its `render`; use that class for several views.
    """
    return MeshRenderer(vertices, faces, face_colors, smooth).render(camera, size, light, supersample)


def render_sides(vertices, faces, size: int, face_colors=None, elevation: float = 15.0) -> list[np.ndarray]:
    """Render the front, right (+X), back and left side: four (size, size, 4) uint8 pictures, with shadows, antialiased.

    The light turns with the camera, so that no side is dark. Arguments and errors as in `MeshRenderer`.
    """
    renderer = MeshRenderer(vertices, faces, face_colors)
    return [
        renderer.render(
            Camera(elevation, azimuth), size, Light(azimuth=azimuth + Light.azimuth, shadows=True), supersample=2
        )
        for azimuth in (0.0, 90.0, 180.0, 270.0)
    ]


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return for each vertex the sum of its faces' normals weighted by area, not normalised; (V,3) float32."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normals = np.cross(b - a, c - a)  # (F,3)
    sums = [np.bincount(faces.ravel(), np.repeat(normals[:, k], 3), minlength=len(vertices)) for k in range(3)]
    return np.stack(sums, axis=1).astype(np.float32)


def _edges(picture: np.ndarray) -> np.ndarray:
    """Mark the pixels of a picture (H,W,4) that differ from one of their four neighbours, (H,W) bool."""
    edges = np.zeros(picture.shape[:2], dtype=bool)
    channels = np.ones(4, dtype=np.float32)
    across = np.abs(np.diff(picture, axis=1)) @ channels > EDGE_CONTRAST
    down = np.abs(np.diff(picture, axis=0)) @ channels > EDGE_CONTRAST
    edges[:, :-1] |= across
    edges[:, 1:] |= across
    edges[:-1] |= down
    edges[1:] |= down
    return edges


def _encode(picture: np.ndarray) -> np.ndarray:
    """Convert (H,W,4) linear, premultiplied floats to sRGB uint8 with straight alpha."""
    out = np.zeros(picture.shape, dtype=np.uint8)
    covered = picture[..., 3] > 0
    pixels = picture[covered]
    linear = np.clip(pixels[:, :3] / pixels[:, 3:], 0, 1)
    out[covered, :3] = to_bytes(linear)
    out[covered, 3] = np.round(pixels[:, 3] * 255)
    return out
