"""Meshes -> vertices and faces in a model's box, and the way back to their own places, one mesh at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from .progress import Progress, run_cancellable
from .samples import sample

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...d3ds2.meshes.mesh import Mesh
    from ...d3ds2.meshes.mesh_to_sdf import SparseSDF
    from ...d3ds2.meshes.placement import Placement

Result = TypeVar("Result")


def for_each_mesh(
    meshes: list[Mesh], fit: bool, resolution: int, progress: Progress, make: Callable[..., Result]
) -> Iterator[tuple[Result, Placement]]:
    """Yield make(vertices (V, 3) in [-1, 1]³, faces (F, 3)) and the place of each mesh. Cancel interrupts it.

    Args:
        fit: centre each mesh and scale it to the box; otherwise it must already lie in core's box [-0.5, 0.5]³.
        resolution: SDF voxels per edge, for the status text.
        progress: counts the meshes.

    Raises:
        ValueError: a mesh extends beyond the box, and `fit` is off.
    """
    from ...d3ds2.meshes import placement
    from ...d3ds2.meshes.triangles import used_vertices

    for index, mesh in enumerate(meshes):
        progress.status(f"mesh {index + 1}/{len(meshes)}: {len(mesh.faces):,} faces to distances at {resolution}³")
        with sample(index, len(meshes)):
            vertices, faces = used_vertices(mesh.vertices, mesh.faces)
            if fit:
                vertices, place = placement.fit(vertices)
            else:
                reach = abs(vertices).max()
                if reach > 0.5:
                    raise ValueError(
                        f"the mesh extends beyond the box [-0.5, 0.5]³, to {reach:.3g}: turn on fit, or scale the mesh "
                        "down."
                    )
                vertices, place = 2 * vertices, placement.HALF_BOX
            with progress.compiling_shown():
                made = run_cancellable(make, vertices, faces)
            yield made, place
        progress.update(index + 1)


def distances(vertices: np.ndarray, faces: np.ndarray, resolution: int, shell: float) -> SparseSDF:
    """Return `mesh_to_sdf` of vertices (V, 3) and faces (F, 3), with a band wide enough for the shell."""
    from ...d3ds2.meshes.mesh_to_sdf import default_band, mesh_to_sdf

    return mesh_to_sdf(vertices, faces, resolution, max(default_band(resolution), 1 + shell), shell)


def with_sample(coords: np.ndarray) -> torch.Tensor:
    """Return coordinates (N, 3) as rows (N, 4) int32 of sample 0."""
    import torch

    return torch.nn.functional.pad(torch.from_numpy(coords).int(), (1, 0))
