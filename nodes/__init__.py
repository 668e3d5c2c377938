"""The nodes, in the order of the data path: image -> structure -> latent -> SDF -> mesh -> file.

Importing this package imports no network, numba or transformers: each node imports what it needs when it runs.
"""

from comfy_api.latest import ComfyExtension, io

from .comfy.folders import place_example_pictures, register_model_folder
from .load_model import LoadD3DS2Model
from .mesh_export import MeshExport
from .mesh_pictures import MeshPictures
from .remove_background import RemoveBackground
from .sparse_structure_sample import SparseStructureSample
from .ssa_dit_sample import SSADiTSample
from .structure_from_mesh import StructureFromMesh
from .vae_decode_sdf import VAEDecodeSDF
from .vae_encode_mesh import VAEEncodeMesh

NODES: list[type[io.ComfyNode]] = [
    LoadD3DS2Model,
    RemoveBackground,
    SparseStructureSample,
    SSADiTSample,
    VAEDecodeSDF,
    MeshExport,
    VAEEncodeMesh,
    StructureFromMesh,
    MeshPictures,
]


class D3DS2Extension(ComfyExtension):
    async def on_load(self) -> None:
        register_model_folder()
        place_example_pictures()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> D3DS2Extension:
    return D3DS2Extension()
