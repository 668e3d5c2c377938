"""A camera for core's 3D viewer from which the whole object is seen.

Left alone, the viewer looks from a distance that follows from the object's width, so a tall object is cut off. It takes
the camera of a LOAD3D_CAMERA socket instead. Before front end 1.44 it also scales every model until its longest edge is
5, and puts it on the ground.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

KEEPS_SIZES = (1, 44)  # the first front end that shows a model in its own size and place
EDGE = 5.0  # the longest edge of a model in older ones
TAN = np.tan(np.radians(35 / 2))  # of half the vertical field of view; a viewer is at least as wide as high
MARGIN = 1.15  # how much more than the object is seen
FROM = np.array([0.45, 0.3, 1.0])  # from the front, a little from the right and above


def camera_of(vertices: np.ndarray) -> dict[str, Any]:
    """Return the camera, as the viewer stores it, for vertices (V, 3) of a file with Y up."""
    low, high = vertices.min(0).astype(float), vertices.max(0).astype(float)
    size, centre = high - low, (low + high) / 2
    if not _keeps_sizes():
        size *= EDGE / max(size.max(), 1e-9)
        centre = np.array([0.0, size[1] / 2, 0.0])
    back = FROM / np.linalg.norm(FROM)
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    corners = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T * size  # from the centre
    # a corner that lies `d` nearer than the centre is in the picture from a distance of |its offset| / TAN + d
    offsets = np.abs(np.stack([corners @ right, corners @ up])).max(0)
    distance = (MARGIN * offsets / TAN + corners @ back).max()
    position, target = (dict(zip("xyz", point.tolist(), strict=True)) for point in (centre + distance * back, centre))
    return {"position": position, "target": target, "zoom": 1, "cameraType": "perspective"}


def _keeps_sizes() -> bool:
    try:
        installed = version("comfyui-frontend-package")
    except PackageNotFoundError:  # a front end from elsewhere
        return True
    return tuple(int(part) for part in installed.split(".")[:2]) >= KEEPS_SIZES
