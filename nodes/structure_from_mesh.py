"""Mesh -> structure: the latent voxels that a mesh's surface passes through."""

from comfy_api.latest import io

from .comfy.errors import plain_errors
from .comfy.mesh_socket import fit_inputs, from_socket, mesh_input
from .comfy.sockets import CATEGORY, Model, ModelSocket, structure_outputs


class StructureFromMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2StructureFromMesh",
            display_name="Structure From Mesh",
            category=CATEGORY,
            description="Turns a mesh from any other source into a structure, so that SSA-DiT Sample can add "
            "detail to it, guided by an image.",
            search_aliases=["refine mesh", "mesh to voxels", "detail", "remesh", "d3ds2"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load D3DS2 Model; it sets the resolution."),
                mesh_input("A mesh or a 3D file: Y up, with the side that the image shows facing +Z."),
                *fit_inputs("Half the thickness, in SDF voxels, given to open sheets."),
            ],
            outputs=structure_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @plain_errors
    def execute(cls, model: Model, mesh, fit, shell) -> io.NodeOutput:
        from ..d3ds2.geometry.voxels import Voxels
        from ..d3ds2.meshes.mesh_to_structure import mesh_to_structure
        from .comfy.fitted_meshes import distances, for_each_mesh, with_sample
        from .comfy.progress import Progress
        from .comfy.samples import pack_structure, structure_results, token_text

        stages = model.pipeline.stages
        resolution = stages[-1].sdf_resolution

        def blocks_of(vertices, faces):
            if len(stages) == 2:  # the second stage was trained on structures made in this way
                return mesh_to_structure(vertices, faces, resolution)
            return distances(vertices, faces, resolution, shell).block_coords

        meshes = from_socket(mesh)
        progress = Progress(cls.hidden.unique_id, len(meshes))
        parts, places = [], []
        for blocks, place in for_each_mesh(meshes, fit, resolution, progress, blocks_of):
            parts.append(Voxels.sort(with_sample(blocks), stages[-1].resolution)[0])
            places.append(place)
        structure = pack_structure(parts, places)
        return io.NodeOutput(*structure_results(structure), ui=progress.result(token_text(structure)))
