"""A camera for core's 3D viewer from which the whole object is seen.

The viewer scales every model until its longest edge is 5, puts it on the ground and, left alone, looks from so near above
that a tall object is cut off. It takes the camera of the socket LOAD3D_CAMERA instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

EDGE = 5.0  # the longest edge of a model in the viewer
TAN = np.tan(np.radians(35 / 2))  # of half its vertical field of view; a viewer is at least as wide as high
MARGIN = 1.1  # how much more than the object is seen
FROM = np.array([0.45, 0.3, 1.0])  # from the front, a little from the right and above


def camera_of(vertices: np.ndarray) -> dict[str, Any]:
    """Return the camera, as the viewer stores it, for vertices (V, 3) of a file with Y up."""
    size = np.ptp(vertices, axis=0).astype(float)
    size *= EDGE / max(size.max(), 1e-9)
    centre = np.array([0.0, size[1] / 2, 0.0])
    back = FROM / np.linalg.norm(FROM)
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    corners = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T * size
    # a corner at depth d before the centre is inside the picture from a distance of |its offset| / tan + d
    offsets = np.abs(np.stack([corners @ right, corners @ up])).max(0)
    distance = (MARGIN * offsets / TAN + corners @ back).max()
    position, target = (dict(zip("xyz", point.tolist(), strict=True)) for point in (centre + distance * back, centre))
    return {"position": position, "target": target, "zoom": 1, "cameraType": "perspective"}
