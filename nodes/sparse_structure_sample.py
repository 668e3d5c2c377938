"""Image -> structure: which latent voxels are occupied."""

from comfy_api.latest import io

from .comfy.errors import plain_errors
from .comfy.sampling import more_sampling_inputs
from .comfy.sockets import CATEGORY, Model, ModelSocket, sampling_inputs, structure_outputs


class SparseStructureSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2SparseStructureSample",
            display_name="Sparse Structure Sample (Rough Shape)",
            category=CATEGORY,
            description="Stage one: finds the rough shape of the object as occupied voxels. It is quick, so "
            "check the shape before you run stage two.",
            search_aliases=["direct3d", "image to 3d", "voxels", "occupancy", "d3ds2"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load D3DS2 Model."),
                io.Image.Input(
                    "image",
                    tooltip="The object, cut out by Remove Background or on a plain background. A batch gives one "
                    "structure per picture, or one structure if it shows views of one object.",
                ),
                *sampling_inputs(
                    "The same seed gives the same structure. Picture i of a batch, counted from 0, uses seed + i."
                ),
                *more_sampling_inputs(
                    "On: the batch shows one object from 2 to 6 sides and makes one structure. Off: each picture shows "
                    "another object."
                ),
            ],
            outputs=structure_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @plain_errors
    def execute(
        cls,
        model: Model,
        image,
        seed,
        steps,
        guidance_scale,
        views_of_one_object=False,
        sampler="euler",
        guidance_start=1.0,
        guidance_end=0.0,
        guidance_rescale=0.0,
        sigmas=None,
    ) -> io.NodeOutput:
        """Sample a structure of each object. Raises ValueError, with advice, if the inputs do not fit."""
        from ..d3ds2.images.voxel_picture import voxel_picture
        from ..d3ds2.networks.activation_memory import (
            image_encoder_bytes,
            image_tokens_bytes,
            structure_dit_bytes,
            structure_vae_bytes,
        )
        from .comfy.memory import dtype_of, load_networks
        from .comfy.progress import Progress, cancellable
        from .comfy.samples import object_pictures, pack_structure, sample, seed_of, structure_results, token_text
        from .comfy.sampling import group_views, make_sampler

        pipeline = model.pipeline
        encoder, dit, vae = pipeline.image_encoder, pipeline.structure_dit, pipeline.structure_vae
        how = make_sampler(sampler, guidance_start, guidance_end, guidance_rescale, sigmas)
        objects = group_views(object_pictures(image), views_of_one_object)
        steps = how.steps(steps or pipeline.sampling.structure_steps)
        guidance_scale = guidance_scale or pipeline.sampling.structure_guidance
        needed = max(
            image_encoder_bytes(encoder.config, 1, dtype_of(encoder)),
            structure_dit_bytes(dit.config, 1 if guidance_scale == 1 else 2, dtype_of(dit))
            + image_tokens_bytes(encoder.config, len(objects[0]), dtype_of(encoder)),
            structure_vae_bytes(vae.config, dit.config.resolution, dtype_of(vae)),
        )
        load_networks(
            model,
            ("image_encoder", "structure_dit", "structure_vae"),
            needed,
            "sampling a structure",
            "choose precision fp16 in Load D3DS2 Model, or use a smaller model",
        )
        progress = Progress(cls.hidden.unique_id, steps * len(objects))
        parts = []
        for index, views in enumerate(objects):
            title = f"picture {index + 1}/{len(objects)}, " if len(objects) > 1 else ""

            def on_step(step, _x_t, x_0, index=index, title=title):
                def draw():
                    voxels = pipeline.decode_structure(x_0)
                    progress.status(f"{title}step {step + 1}/{steps}: {len(voxels):,} tokens")
                    return voxel_picture(voxels.coords[:, 1:].cpu().numpy(), voxels.resolution)

                progress.update(index * steps + step + 1, draw)

            with sample(index, len(objects)), cancellable(encoder, dit, vae), progress.compiling_shown():
                progress.status(f"{title}reading the image")
                tokens, mirrored = pipeline.encode_sides([views], steps)
                seeds = [seed_of(seed, index)]
                parts.append(pipeline.sample_structure(tokens, seeds, steps, guidance_scale, on_step, how, mirrored))
        structure = pack_structure(parts)
        return io.NodeOutput(*structure_results(structure), ui=progress.result(token_text(structure)))
