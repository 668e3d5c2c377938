"""Latent -> SDF -> mesh."""

from comfy_api.latest import io

from .comfy.errors import plain_errors
from .comfy.sockets import CATEGORY, SDF, Latent, LatentSocket, Model, ModelSocket, SDFSocket


class VAEDecodeSDF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2VAEDecodeSDF",
            display_name="VAE Decode SDF (Latent to Mesh)",
            category=CATEGORY,
            description="Decodes a latent into a signed distance field and extracts the surface as a closed mesh.",
            search_aliases=["direct3d", "image to 3d", "marching cubes", "latent to mesh", "d3ds2"],
            inputs=[
                ModelSocket.Input("model", tooltip="The model that made the latent."),
                LatentSocket.Input("latent", tooltip="From SSA-DiT Sample or VAE Encode Mesh."),
                io.Float.Input(
                    "level",
                    default=0.0,
                    min=-0.9,
                    max=0.9,
                    step=0.01,
                    tooltip="Moves the surface: positive values make the object thicker, negative values thinner. 1 "
                    "is the width of the SDF's band, 2 to 4 voxels.",
                    advanced=True,
                ),
                io.Float.Input(
                    "memory_budget_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="Memory in GB that decoding may use on the device. Large latents are decoded in chunks "
                    "that fit. 0 uses what is free.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "keep_largest", default=False, tooltip="Keep only the connected part with the most faces."
                ),
                io.Float.Input(
                    "min_component",
                    default=0.05,
                    min=0.0,
                    max=1_000_000.0,
                    step=0.01,
                    tooltip="Parts with fewer faces than this are dropped. Below 1, it is a fraction of the largest "
                    "part's faces; from 1 up, it is a number of faces.",
                ),
            ],
            outputs=[
                io.Mesh.Output(
                    "mesh",
                    tooltip="A closed mesh: faces outward, Y up, front toward +Z. It lies in [-0.5, 0.5]³, where "
                    "ComfyUI's own mesh nodes expect it; one that was made of a mesh has that mesh's size and place.",
                ),
                SDFSocket.Output("sdf", tooltip="The decoded signed distances."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @plain_errors
    def execute(
        cls, model: Model, latent: Latent, level, memory_budget_gb, keep_largest, min_component
    ) -> io.NodeOutput:
        """Decode latents and extract their surfaces. Raises ValueError if the latent belongs to another model."""
        import torch

        from ..d3ds2.meshes.placement import place
        from .comfy.mesh_socket import to_socket
        from .comfy.progress import Progress
        from .comfy.samples import sample, token_text
        from .comfy.sdf_decoding import decode, extract

        resolution = latent.structure.resolution
        if resolution not in model.stages or latent.made_for != model.latent_space(resolution):
            raise ValueError(
                f"wrong latent for this model: the latent was made with {latent.made_for[0]!r}, but the model is "
                f"{model.name!r}. Connect the model that made the latent."
            )
        voxels = latent.structure.voxels()
        B = voxels.batch_size
        progress = Progress(cls.hidden.unique_id, 2 * B)
        values, coords, meshes = [], [], []
        for index, latents in enumerate(latent.latents.split(voxels.counts)):
            with sample(index, B), progress.compiling_shown():
                blocks = decode(model, latents, voxels.sample(index), memory_budget_gb, progress)
                progress.update(2 * index + 1)
                progress.status(f"extracting the surface of {blocks.values.numel():,} voxels")
                surface = model.pipeline.sampling.level + level
                found, blocks = extract(model, blocks, min_component, surface, keep_largest)
                meshes += [place(mesh, latent.structure.place_of(index)) for mesh in found]
                progress.update(2 * index + 2)
            values.append(blocks.values)
            coords.append(blocks.coords + torch.tensor([index, 0, 0, 0], dtype=torch.int32))
        faces = " + ".join(f"{len(mesh.faces):,}" for mesh in meshes)
        line = f"{faces} faces from {token_text(latent.structure)}"
        sdf_resolution = model.stages[resolution].sdf_resolution
        sdf = SDF(torch.cat(values), torch.cat(coords), sdf_resolution, B)
        return io.NodeOutput(to_socket(meshes), sdf, ui=progress.result(line))
