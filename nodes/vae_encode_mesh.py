"""Mesh -> latent: encodes any mesh with the SDF VAE."""

from functools import partial

from comfy_api.latest import io

from .comfy.errors import plain_errors
from .comfy.mesh_socket import fit_inputs, from_socket, mesh_input
from .comfy.sockets import CATEGORY, Latent, LatentSocket, Model, ModelSocket


class VAEEncodeMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2VAEEncodeMesh",
            display_name="VAE Encode Mesh (Mesh to Latent)",
            category=CATEGORY,
            description="Turns a mesh of any quality into a watertight solid and encodes it. Follow it with VAE "
            "Decode SDF to remesh.",
            search_aliases=["remesh", "watertight", "mesh to latent", "repair mesh", "d3ds2"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load D3DS2 Model."),
                mesh_input("A mesh or a 3D file. It may be open, intersect itself or have many parts."),
                *fit_inputs(
                    "Half the thickness, in SDF voxels, given to open sheets. Gaps up to twice this wide are "
                    "closed too."
                ),
            ],
            outputs=[LatentSocket.Output("latent", tooltip="For VAE Decode SDF with the same model.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @plain_errors
    def execute(cls, model: Model, mesh, fit, shell) -> io.NodeOutput:
        import comfy.model_management as mm
        import torch

        from ..d3ds2.geometry.voxels import Voxels
        from ..d3ds2.networks.activation_memory import sdf_encode_bytes
        from .comfy.fitted_meshes import distances, for_each_mesh, with_sample
        from .comfy.memory import dtype_of, load_networks
        from .comfy.progress import Progress, cancellable, run_networks
        from .comfy.samples import pack_structure, token_text

        stage = model.pipeline.stages[-1]
        resolution, vae, device = stage.sdf_resolution, stage.sdf_vae, mm.get_torch_device()
        meshes = from_socket(mesh)
        progress = Progress(cls.hidden.unique_id, len(meshes))
        parts, places, latents = [], [], []
        as_sdf = partial(distances, resolution=resolution, shell=shell)
        for sdf, place in for_each_mesh(meshes, fit, resolution, progress, as_sdf):
            coords, values = with_sample(sdf.coords), torch.from_numpy(sdf.sdf)[:, None]
            progress.status(f"encoding {len(coords):,} voxels")
            load_networks(
                model,
                (f"{stage.prefix}sdf_vae",),
                sdf_encode_bytes(vae.config, len(coords), dtype_of(vae)),
                f"encoding {len(coords):,} voxels",
                "use a model of lower resolution",
            )
            with cancellable(vae):
                voxels = Voxels(coords.to(device), resolution, 1)
                mean, _, own = run_networks(device, vae.encode, values.to(device), voxels)
            latents.append(mean.float().cpu())
            parts.append(own)
            places.append(place)
        structure = pack_structure(parts, places)
        latent = Latent(torch.cat(latents), structure, model.latent_space(structure.resolution))
        return io.NodeOutput(latent, ui=progress.result(token_text(structure)))
