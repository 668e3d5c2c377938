"""Decoded SDF blocks -> a mesh of each sample, on the blocks' device."""

from .generation_error import GenerationError, empty_result
from .geometry.sdf_blocks import SDFBlocks
from .kernels.devices import on_cuda
from .meshes.mesh import Mesh
from .meshes.sdf_to_mesh import DECODED_OPTIONS
from .meshes.sdf_to_mesh_gpu import device_mesh, tensors_to_mesh


def blocks_to_meshes(blocks: SDFBlocks, min_component: float, level: float, keep_largest: bool) -> list[Mesh]:
    """Extract the surface at a level of each sample. Arguments and errors are those of `Pipeline.blocks_to_meshes`."""
    if not -1 < level < 1:
        raise GenerationError(f"expected the level of the surface in (-1, 1), got {level}")
    if not blocks.values.isfinite().all():
        message = f"the SDF came out with values that are not finite on {blocks.values.device}; try float32"
        raise GenerationError(message)
    options = DECODED_OPTIONS | {
        "min_component": min_component,
        "level": level,
        "keep_largest": keep_largest,
    }
    make_mesh = device_mesh if on_cuda(blocks.values) else tensors_to_mesh
    meshes = []
    for coords, values in blocks.samples():
        if not (values < level).any():
            raise empty_result("surface", len(meshes), blocks.batch_size)
        meshes.append(make_mesh(coords, values, blocks.resolution, **options))
    return meshes
