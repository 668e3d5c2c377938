"""Render batches of surfels on their device: pictures as `render_views` makes them, and where each pixel sees the mesh.

Each point covers the pixels near its place, and a pixel shows the nearest point. A pixel most of whose neighbours show
something nearer is a gap between points, and takes the nearest neighbour's. Light is that of
`d3ds2.images.render`, and shadows come from a depth map as the key light sees it. The object fills the square as
`preprocess` leaves it.

Sizes: B pictures, P points of each, E pixels per edge.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.images.foreground import MARGIN, SIZE
from d3ds2.images.render import SENSOR_MM, Camera, Light
from d3ds2.kernels.device_constant import device_constant

REACH = 0.8  # pixels from a point up to which it is seen: with 1.4, contours are too far out
NOWHERE = torch.iinfo(torch.int64).max  # the key of a pixel without any point
BEHIND = 1e9  # the depth of such a pixel
LOW = (1 << 32) - 1  # bits of a key that hold the point
IN_FRONT = 0.002  # of the cube's half edge: how much nearer the neighbours of a gap are
NEIGHBOURS = 6  # of eight; on a plane, at most five are nearer
FILL_TIMES = 3
SHADOW_EDGE = 192  # pixels of the light's depth map, which spans the cube's diagonal
SHADOW_BIAS = 0.08  # of the cube's half edge
FITTED = (SIZE + 2 * MARGIN) / SIZE  # half the picture's edge by that of the object in it, as `preprocess` makes it


class Shots(NamedTuple):
    """Cameras and lights of pictures; a row for each. Angles in degrees, as in `Camera` and `Light`."""

    elevation: Tensor  # (B,)
    azimuth: Tensor
    focal_mm: Tensor
    light_elevation: Tensor
    light_azimuth: Tensor
    key: Tensor
    fill: Tensor
    sky: Tensor
    ground: Tensor
    shadows: Tensor  # (B,) bool
    key_color: Tensor  # (B, 3) linear
    ambient_color: Tensor  # (B, 3) linear


def shots_of(cameras: list[Camera], lights: list[Light], device: torch.device) -> Shots:
    """Return given cameras and lights as `Shots`; their targets and radii are those of the points."""

    def column(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    of_cameras = (column([getattr(c, name) for c in cameras]) for name in ("elevation", "azimuth", "focal_mm"))
    names = ("elevation", "azimuth", "key", "fill", "sky", "ground", "shadows", "key_color", "ambient_color")
    of_lights = {name: column([getattr(light, name) for light in lights]) for name in names}
    return Shots(*of_cameras, *(of_lights | {"shadows": of_lights["shadows"] > 0}).values())


def direction(elevation: Tensor, azimuth: Tensor) -> Tensor:
    """Return unit vectors (B, 3) of angles (B,) in degrees, as `d3ds2.images.render.direction` does."""
    e, a = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    return torch.stack([a.sin() * e.cos(), e.sin(), a.cos() * e.cos()], dim=1)


def axes(elevation: Tensor, azimuth: Tensor) -> Tensor:
    """Return the unit vectors right, up and backward of cameras (B,), (B, 3, 3)."""
    backward, a = direction(elevation, azimuth), torch.deg2rad(azimuth)
    right = torch.stack([a.cos(), torch.zeros_like(a), -a.sin()], dim=1)
    return torch.stack([right, torch.linalg.cross(backward, right), backward], dim=1)


class Seen(NamedTuple):
    """The points that the pixels of pictures show."""

    point: Tensor  # (B, E²) int64, the place of the nearest point; 0 beside the object
    mask: Tensor  # (B, E²) bool
    xyz: Tensor  # (B, E², 3) float32, that of the point; zero beside the object
    camera: Tensor  # (B, 3), where the picture was taken


def look(points: Tensor, shots: Shots, edge: int) -> Seen:
    """Find the point (B, P, 3) that each pixel of each picture shows, E = `edge`."""
    camera = cameras(points, shots)
    nearest = nearest_points(*project(points, camera, shots, edge), edge)
    mask = nearest != LOW
    nearest = nearest * mask
    xyz = points.gather(1, nearest[..., None].expand(-1, -1, 3)) * mask[..., None]
    return Seen(nearest, mask, xyz, camera)


def shade(seen: Seen, normals: Tensor, colors: Tensor, points: Tensor, shots: Shots) -> Tensor:
    """Return pictures (B, 4, E, E) in [0, 1]: the object on white, and its mask.

    Args:
        normals: (B, E², 3) float32 of the pixels, either side.
        colors: (B, E², 3) or (B, 1, 3) float32, linear.
        points: (B, P, 3) of the surface, which cast shadows.
    """
    rgb = linear_to_srgb((colors * light(seen, normals, points, shots)).clamp(0, 1))
    mask = seen.mask[..., None]
    pixels = torch.cat([torch.where(mask, rgb, 1.0), mask], dim=2).transpose(1, 2)
    return pixels.unflatten(2, (math.isqrt(pixels.shape[2]), -1))


def cameras(points: Tensor, shots: Shots) -> Tensor:
    """Return where the cameras stand that look at points (B, P, 3), as `Camera` says: (B, 3)."""
    target = (points.amin(1) + points.amax(1)) / 2
    radius = torch.linalg.vector_norm(points - target[:, None], dim=2).amax(1)
    half_width = SENSOR_MM / 2 / shots.focal_mm
    distance = torch.sqrt(1 + half_width**2) / half_width * radius
    return target + direction(shots.elevation, shots.azimuth) * distance[:, None]


def project(points: Tensor, camera: Tensor, shots: Shots, edge: int) -> tuple[Tensor, Tensor]:
    """Return where cameras (B, 3) see points (B, P, 3): columns and rows (B, P, 2) in pixels, and depths (B, P).

    The picture is cut to the object.
    """
    frame = axes(shots.elevation, shots.azimuth).transpose(1, 2)
    x, y, z = ((points - camera[:, None]) @ frame).unbind(2)  # (B, P) each
    depth = -z
    plane = torch.stack([x / depth, -y / depth], dim=2)
    low, high = plane.amin(1), plane.amax(1)  # (B, 2)
    half = ((high - low).amax(1) / 2 * FITTED).clamp(min=1e-6)
    centred = (plane - ((low + high) / 2)[:, None]) / half[:, None, None]
    return (centred + 1) * (edge / 2), depth


def nearest_points(places: Tensor, depth: Tensor, edge: int) -> Tensor:
    """Return the point that each pixel shows, (B, E²) int64; LOW where there is none.

    Args:
        places: (B, P, 2) columns and rows in pixels; what lies outside the picture is left out.
        depth: (B, P), positive.
    """
    B, P = depth.shape
    bits = depth.contiguous().view(torch.int32).long() << 32  # the order of positive floats
    keys = bits | torch.arange(P, device=depth.device)
    buffer = torch.full((B, edge * edge + 1), NOWHERE, device=depth.device)  # the last takes what is outside
    corner = (places - 0.5).floor().int()
    for right in (0, 1):
        for down in (0, 1):
            column, row = corner[..., 0] + right, corner[..., 1] + down
            near = ((column + 0.5 - places[..., 0]) ** 2 + (row + 0.5 - places[..., 1]) ** 2) < REACH**2
            inside = near & (column >= 0) & (column < edge) & (row >= 0) & (row < edge)
            pixel = torch.where(inside, row * edge + column, edge * edge)
            buffer.scatter_reduce_(1, pixel.long(), keys, "amin")
    pixels = buffer[:, :-1].unflatten(1, (edge, edge))
    for _ in range(FILL_TIMES):
        pixels = fill_gaps(pixels)
    return pixels.flatten(1) & LOW


def fill_gaps(keys: Tensor) -> Tensor:
    """Give pixels of keys (B, E, E) that lie behind most of their neighbours the nearest neighbour's key."""
    E = keys.shape[-1]
    padded = keys.new_full((len(keys), E + 2, E + 2), NOWHERE)  # F.pad would round it
    padded[:, 1:-1, 1:-1] = keys
    depth = torch.where(padded == NOWHERE, BEHIND, (padded >> 32).int().view(torch.float32))
    limit, nearer = depth[:, 1:-1, 1:-1] - IN_FRONT, torch.zeros_like(keys, dtype=torch.int8)
    for i, j in itertools.product(range(3), repeat=2):
        nearer += depth[:, i : i + E, j : j + E] < limit
    nearest = padded
    for dim in (1, 2):
        before, here, after = (nearest.narrow(dim, i, E) for i in range(3))
        nearest = torch.minimum(torch.minimum(before, here), after)
    return torch.where(nearer >= NEIGHBOURS, nearest, keys)


def light(seen: Seen, normal: Tensor, points: Tensor, shots: Shots) -> Tensor:
    """Return the light (B, E², 3) that reaches what is seen of points (B, P, 3), with normals (B, E², 3); white = 1."""
    backward = direction(shots.elevation, shots.azimuth)
    toward = direction(shots.light_elevation, shots.light_azimuth)
    facing = ((seen.camera[:, None] - seen.xyz) * normal).sum(2, keepdim=True)
    normal = normal * torch.where(facing < 0, -1.0, 1.0)
    key = (normal @ toward[:, :, None]).clamp(min=0) * shots.key[:, None, None]  # (B, E², 1)
    key = key * torch.where(shots.shadows[:, None, None], lit(seen.xyz, normal, points, shots), 1.0)
    fill = (normal @ backward[:, :, None]).clamp(min=0) * shots.fill[:, None, None]
    sky, ground = shots.sky[:, None, None], shots.ground[:, None, None]
    ambient = (sky + ground) / 2 + normal[..., 1:2] * ((sky - ground) / 2)
    return key * shots.key_color[:, None] + (fill + ambient) * shots.ambient_color[:, None]


def lit(seen: Tensor, normal: Tensor, points: Tensor, shots: Shots) -> Tensor:
    """Return how much of the key light reaches seen places (B, n, 3), in [0, 1]: (B, n, 1)."""
    frame = axes(shots.light_elevation, shots.light_azimuth).transpose(1, 2)
    span = math.sqrt(3) + 0.1  # half the depth map's edge: the cube fits whichever way it is turned

    def seen_from_light(at: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = (at @ frame).unbind(2)
        return torch.stack([x / span + 1, 1 - y / span], dim=2) * (SHADOW_EDGE / 2), 2 * span - z

    places, depth = seen_from_light(points)
    B, E = len(points), SHADOW_EDGE
    column, row = places.int().unbind(2)
    nearest = torch.full((B, E * E), BEHIND, device=points.device)
    nearest.scatter_reduce_(1, (row * E + column).long(), depth, "amin")
    nearest = -F.max_pool2d(-nearest.view(B, 1, E, E), 3, stride=1, padding=1)  # no light through gaps between points
    places, depth = seen_from_light(seen + normal * SHADOW_BIAS / 2)
    grid = (places / (E / 2) - 1)[:, None]  # (B, 1, n, 2)
    shadow = torch.zeros_like(depth)
    for across, down in itertools.product((-1 / E, 1 / E), repeat=2):  # half a pixel
        shift = device_constant((across, down), grid.device, grid.dtype)
        stored = F.grid_sample(nearest, grid + shift, mode="nearest", align_corners=False)
        shadow += stored[:, 0, 0] < depth - SHADOW_BIAS
    return (1 - shadow / 4)[..., None]


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Encode linear values in [0, 1], of any shape, as sRGB in [0, 1]."""
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)
