"""UVs, textures and vertex colours of core's MESH; which of them it has depends on the version of ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from comfy_api.latest import Types

    from ...d3ds2.meshes.appearance import Appearance
    from ...d3ds2.meshes.mesh import Mesh


def looks_of(socket: Types.MESH | Types.File3D, meshes: list[Mesh]) -> list[Appearance]:
    """Return the look of each mesh that `from_socket` made of a socket; of a 3D file only the geometry is read.

    Raises ValueError if UVs or colours are not one for each vertex.
    """
    from ...d3ds2.meshes.appearance import GLTF_TEXTURES, Appearance

    if not hasattr(socket, "vertices"):
        return [Appearance()] * len(meshes)
    looks = []
    for index, mesh in enumerate(meshes):
        textures = {}
        for name in GLTF_TEXTURES:
            texture = _item(socket, name, index)
            if texture is not None:
                pixels = np.nan_to_num(texture[..., :3]) if texture.ndim else texture
                textures[name] = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        if "metallic_roughness" in textures and getattr(socket, "occlusion_in_mr", False):
            textures["occlusion"] = textures["metallic_roughness"]
        uvs, colors = (_of_vertices(socket, name, index, mesh) for name in ("uvs", "vertex_colors"))
        looks.append(Appearance(uvs, textures, colors))
    return looks


def _item(socket: Any, name: str, index: int) -> np.ndarray | None:
    """Return an item of a batch of tensors; one that has a single item is shared by all meshes."""
    batch = getattr(socket, name, None)
    if batch is None:
        return None
    if not isinstance(batch, torch.Tensor) or not batch.ndim or batch.is_complex():
        raise ValueError(f"expected a tensor of {name}, got {type(batch).__name__}")
    if not len(batch):
        return None
    return batch[min(index, len(batch) - 1)].detach().float().cpu().numpy()


def _of_vertices(socket: Any, name: str, index: int, mesh: Mesh) -> np.ndarray | None:
    values = _item(socket, name, index)
    if values is None:
        return None
    count = len(values) if values.ndim else 0
    if count < len(mesh.vertices):
        raise ValueError(f"expected {name} of all {len(mesh.vertices):,} vertices, got {count:,}")
    return values[: len(mesh.vertices)]
