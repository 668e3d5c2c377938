"""Pictures of a mesh's normals, for Normal-FID. Imports no torch, for the processes of the pool that make them.

The paper says neither how it renders normals nor from where. Here a picture shows the normals in the frame of the
shape, as colours on white, from VIEWS sides.
"""

import numpy as np

from d3ds2.images.render import Camera, Light, MeshRenderer

SIZE = 256  # pixels per edge, S
VIEWS = (0.0, 90.0, 180.0, 270.0)  # azimuths
EVEN_LIGHT = Light(key=0.0, fill=0.0, sky=1.0, ground=1.0)  # shows the colours as they are


def normal_pictures(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Render the normals of a mesh (V, 3), (F, 3) from all VIEWS: (4, S, S, 3) uint8; white without faces."""
    pictures = np.full((len(VIEWS), SIZE, SIZE, 3), 255, dtype=np.uint8)
    if len(faces) == 0:
        return pictures
    corners = np.asarray(vertices, dtype=np.float64)[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    renderer = MeshRenderer(vertices, faces, np.round((normals + 1) * 127.5).astype(np.uint8))
    for picture, azimuth in zip(pictures, VIEWS, strict=True):
        made = renderer.render(Camera(azimuth=azimuth), SIZE, EVEN_LIGHT, supersample=2)
        picture[:] = on_white(made)
    return pictures


def on_white(picture: np.ndarray) -> np.ndarray:
    """Put a picture (S, S, 4) uint8 with straight alpha on white: (S, S, 3) uint8."""
    opacity = picture[..., 3:] / 255
    return np.round(picture[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
