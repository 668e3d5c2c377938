"""MESH socket -> signed distances at a model's resolution, one mesh after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .io_types import Model
from .mesh_socket import from_socket
from .progress import Progress, run_cancellable
from .samples import sample

if TYPE_CHECKING:
    import numpy as np
    import torch
    from comfy_api.latest import Types

    from ..d3ds2.mesh_to_sdf import SparseSDF


def meshes_to_sdf(socket: Types.MESH, model: Model, fit: bool, shell: float, progress: Progress) -> Iterator[SparseSDF]:
    """Voxelise each mesh of a MESH for a model.

    Args:
        fit: centre and scale it to the model's box; otherwise it must lie in [-1, 1]³.
        shell: see `mesh_to_sdf`.
        progress: gets a text for each mesh and counts them.

    Raises:
        ValueError: an empty or damaged mesh, or one outside the box without `fit`, with what to do.
    """
    from ..d3ds2.mesh_to_sdf import default_band, mesh_to_sdf, normalize_mesh

    resolution = model.pipeline.sampling.sdf_resolution
    meshes = from_socket(socket)
    for index, mesh in enumerate(meshes):
        progress.status(f"mesh {index + 1}/{len(meshes)}: {len(mesh.faces):,} faces to distances at {resolution}³")
        with sample(index, len(meshes)):
            vertices = normalize_mesh(mesh.vertices) if fit else mesh.vertices
            if not fit and abs(vertices).max() > 1:
                reach = abs(vertices).max()
                raise ValueError(
                    f"the mesh reaches out of the box [-1, 1]³, to {reach:.3g}: switch fit on, or scale it."
                )
            band = max(default_band(resolution), 1 + shell)
            yield run_cancellable(mesh_to_sdf, vertices, mesh.faces, resolution, band, shell)
        progress.update(index + 1)


def with_sample(coords: np.ndarray) -> torch.Tensor:
    """Coordinates (N, 3) -> (N, 4) int32 of sample 0."""
    import torch

    return torch.nn.functional.pad(torch.from_numpy(coords).int(), (1, 0))
