"""Structure and image -> latent: 16 numbers for each occupied voxel, by the sparse latent DiT."""

from comfy_api.latest import io

from .comfy.errors import plain_errors
from .comfy.sampling import more_sampling_inputs
from .comfy.sockets import (
    CATEGORY,
    Latent,
    LatentSocket,
    Model,
    ModelSocket,
    Structure,
    StructureSocket,
    sampling_inputs,
)


class SSADiTSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2SSADiTSample",
            display_name="SSA-DiT Sample (Surface Detail)",
            category=CATEGORY,
            description="Stage two: adds surface detail to every voxel of the structure, using spatial sparse "
            "attention.",
            search_aliases=["direct3d", "image to 3d", "sparse attention", "sampler", "d3ds2"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load D3DS2 Model."),
                StructureSocket.Input("structure", tooltip="From Sparse Structure Sample or Structure From Mesh."),
                io.Image.Input(
                    "image",
                    tooltip="The object, cut out or on a plain background: one image for all structures, or one for "
                    "each, or several views of the one object.",
                ),
                *sampling_inputs(
                    "The same seed gives the same latent. Sample i of a batch, counted from 0, uses seed + i."
                ),
                io.Int.Input(
                    "max_tokens",
                    default=250_000,
                    min=1,
                    max=4_000_000,
                    tooltip="A structure with more tokens than this is rejected before sampling starts.",
                    advanced=True,
                ),
                *more_sampling_inputs(
                    "On: the batch shows one object from 2 to 6 sides. Off: each picture belongs to a structure of its "
                    "own."
                ),
            ],
            outputs=[LatentSocket.Output("latent", tooltip="For VAE Decode SDF.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    @plain_errors
    def execute(
        cls,
        model: Model,
        structure: Structure,
        image,
        seed,
        steps,
        guidance_scale,
        max_tokens,
        views_of_one_object=False,
        sampler="euler",
        guidance_start=1.0,
        guidance_end=0.0,
        guidance_rescale=0.0,
        sigmas=None,
    ) -> io.NodeOutput:
        """Sample the latents of each structure. Raises ValueError, with advice, if the inputs do not fit."""
        import comfy.model_management as mm
        import torch

        from ..d3ds2.images.voxel_picture import latent_colors, voxel_picture
        from ..d3ds2.networks.activation_memory import image_encoder_bytes, image_tokens_bytes, latent_dit_bytes
        from ..d3ds2.pipeline import GUIDED_BATCH_TOKENS
        from .comfy.memory import dtype_of, load_networks
        from .comfy.progress import Progress, cancellable
        from .comfy.samples import check_structure, object_pictures, sample, seed_of, token_text
        from .comfy.sampling import group_views, make_sampler
        from .comfy.sdf_decoding import check_budgets_ahead

        check_structure(model, structure)
        how = make_sampler(sampler, guidance_start, guidance_end, guidance_rescale, sigmas)
        pipeline, voxels = model.pipeline, structure.voxels()
        stage = model.stages[structure.resolution]
        encoder, dit = pipeline.image_encoder, stage.latent_dit
        largest = max(voxels.counts)
        if largest > max_tokens:
            raise ValueError(
                f"the structure has {largest:,} tokens, more than max_tokens {max_tokens:,}: use a model of lower "
                "resolution or a picture of a more compact object, or raise max_tokens."
            )
        check_budgets_ahead(model, structure, cls.hidden)
        objects = group_views(object_pictures(image), views_of_one_object)
        if len(objects) not in (1, structure.batch_size):
            advice = "; turn on views_of_one_object if they show one object" if structure.batch_size == 1 else ""
            raise ValueError(
                f"expected 1 image or {structure.batch_size}, one per structure, got {len(objects)}{advice}"
            )
        steps, guidance_scale = how.steps(steps or stage.steps), guidance_scale or stage.guidance_scale
        branches = 1 if guidance_scale == 1 or largest > GUIDED_BATCH_TOKENS else 2
        needed = max(
            image_encoder_bytes(encoder.config, 1, dtype_of(encoder)),
            latent_dit_bytes(dit.config, branches * largest, dtype_of(dit), mm.get_torch_device())
            + image_tokens_bytes(encoder.config, len(objects[0]), dtype_of(encoder)),
        )
        load_networks(
            model,
            ("image_encoder", f"{stage.prefix}latent_dit"),
            needed,
            f"sampling {largest:,} tokens",
            "use a model of lower resolution, or set guidance_scale to 1",
        )
        progress = Progress(cls.hidden.unique_id, steps * structure.batch_size)
        parts = []
        for index in range(structure.batch_size):
            own = voxels.sample(index)
            coords = own.coords[:, 1:].numpy()
            title = f"sample {index + 1}/{structure.batch_size}, " if structure.batch_size > 1 else ""

            def on_step(step, _x_t, x_0, index=index, title=title, coords=coords):
                progress.status(f"{title}step {step + 1}/{steps}: {len(coords):,} tokens")
                progress.update(
                    index * steps + step + 1,
                    lambda: voxel_picture(coords, structure.resolution, colors=latent_colors(x_0.cpu().numpy())),
                )

            with sample(index, structure.batch_size), cancellable(encoder, dit), progress.compiling_shown():
                progress.status(f"{title}reading the image")
                tokens = pipeline.encode_views([objects[index % len(objects)]])
                seeds = [seed_of(seed, index)]
                latents = pipeline.sample_latents(own, tokens, seeds, steps, guidance_scale, on_step, how)
                parts.append(latents.float().cpu())
        latent = Latent(torch.cat(parts), structure, model.latent_space(structure.resolution))
        return io.NodeOutput(latent, ui=progress.result(token_text(structure)))
