"""Where a mesh lies and how large it is: fitted into a model's box, put back into its own place, scaled for a file.

A model's box is [-1, 1]³, and what is fitted into it fills MARGIN of it. ComfyUI's own nodes take meshes in
[-0.5, 0.5]³: `HALF_BOX` is that place.
"""

from dataclasses import dataclass

import numpy as np

from .mesh import Mesh
from .mesh_file import turn_z_up
from .mesh_to_sdf import FITTED_SCALE, normalize_mesh
from .triangles import used_vertices

MILLIMETRES = (".stl", ".3mf")  # files that programs for 3D printing read as millimetres; all others are in metres
SMALLEST, LARGEST = 1e-6, 1e6  # metres
UP_AXES = ("Y", "Z")


@dataclass(frozen=True)
class Placement:
    """The place of a mesh in its own world: point p of the model's box lies at scale * p + centre."""

    scale: float
    centre: tuple[float, float, float]


HALF_BOX = Placement(0.5, (0.0, 0.0, 0.0))


def fit(vertices: np.ndarray) -> tuple[np.ndarray, Placement]:
    """Return vertices (V,3) centred in the model's box as `normalize_mesh` does, and the way back.

    Raises:
        ValueError: as `normalize_mesh`.
    """
    fitted = normalize_mesh(vertices)
    low, high = vertices.min(0).astype(np.float64), vertices.max(0).astype(np.float64)
    return fitted, Placement(float((high - low).max()) / (2 * FITTED_SCALE), tuple(((low + high) / 2).tolist()))


def place(mesh: Mesh, placement: Placement) -> Mesh:
    """Return a mesh of the model's box in its own place."""
    vertices = mesh.vertices.astype(np.float64) * placement.scale + placement.centre
    return Mesh(vertices.astype(np.float32), mesh.faces, mesh.normals)


def unit_of(kind: str) -> str:
    """Return the unit of a file's coordinates; `kind` is an extension with its dot."""
    return "mm" if kind in MILLIMETRES else "m"


def check_size(size: float) -> None:
    """Raise ValueError unless a size in metres is 0, or one at which float32 keeps the shape."""
    if size != 0 and not SMALLEST <= size <= LARGEST:
        raise ValueError(f"expected a size in metres from {SMALLEST:g} to {LARGEST:g}, or 0, got {size}")


def in_file_frame(mesh: Mesh, kind: str, size: float = 1.0, up_axis: str = "Y") -> Mesh:
    """Return a mesh as a file is to hold it: of a real size, in the file's unit, with its up axis.

    Args:
        mesh: with Y up.
        kind: extension of the file, with its dot.
        size: longest edge of the bounding box in metres. 0 keeps the coordinates as they are, whatever the unit.
        up_axis: "Y" or "Z".

    Raises:
        ValueError: the size is out of range, the axis is another one, or all vertices lie in one point.
    """
    check_size(size)
    if up_axis not in UP_AXES:
        raise ValueError(f"expected an up axis of {' or '.join(UP_AXES)}, got {up_axis!r}")
    if size:
        longest = float(np.ptp(used_vertices(mesh.vertices, mesh.faces)[0], axis=0).max())
        if longest <= 0:
            raise ValueError("expected a mesh with an extent, got all vertices in one point")
        per_metre = 1000.0 if unit_of(kind) == "mm" else 1.0
        mesh = place(mesh, Placement(size * per_metre / longest, (0.0, 0.0, 0.0)))
    return turn_z_up(mesh) if up_axis == "Z" else mesh
