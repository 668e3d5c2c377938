"""Overrides that shrink the paper's recipe until a CPU runs all of its stages in a minute or two."""

LOW, HIGH = 64, 128  # the resolutions of the two stages, instead of 512 and 1024

VAE = [
    "hidden_size=32",
    "num_heads=2",
    "encoder_depth=1",
    "decoder_depth=1",
    "group_norm_groups=2",
    "latent_channels=4",
]
DIT = ["hidden_size=32", "depth=2", "num_heads=16", "num_kv_heads=1", "context_size=16", "latent_channels=4"]
DIT += ["compression_block=2"]  # which divides the latent grid of 6³
STRUCTURE_VAE = [
    *("latent_channels=2", "encoder_widths=[8,16]", "decoder_widths=[16,8]", "encoder_res_blocks=1"),
    *("encoder_middle_blocks=1", "decoder_res_blocks=1", "decoder_middle_blocks=1", "threshold=0.5"),
]
STRUCTURE_DIT = ["resolution=4", "latent_channels=2", "hidden_size=32", "depth=1", "num_heads=2", "context_size=16"]
ENCODER = ["image_size=28", "hidden_size=16", "depth=1", "num_heads=2", "num_registers=1"]
RESOLUTIONS = {"256": 32, "384": 48, "512": LOW, "1024": HIGH}


def small_recipe(steps: int) -> list[str]:
    """Return the overrides: tiny networks, `steps` steps a stage, an image encoder that starts from random weights."""
    own = {
        "prepare_shapes": [f"resolutions={list(RESOLUTIONS.values())}", "workers=2"],
        "render_views": ["views=2", "size=64", "supersample=1", "workers=2", "elevation=[20,20]", "azimuth=[0,0]"],
        "train_vae": ["batch_size=2", *(f"model.{value}" for value in VAE)],
        "train_vae_512": [f"resolutions=[32,48,{LOW}]"],
        "train_vae_1024": [f"resolutions=[{HIGH}]", "crop=4", "crop_margin=3"],
        "train_structure_vae": [f"resolution={LOW}", "batch_size=2", *(f"model.{value}" for value in STRUCTURE_VAE)],
        "train_structure_dit": [
            *(f"resolution={LOW}", "batch_size=4", "pretrained_encoder=", "train_image_encoder=true"),
            *(f"model.{value}" for value in STRUCTURE_DIT),
            *(f"image_encoder.{value}" for value in ENCODER),
        ],
        "train_dit": ["batch_size=2", *(f"model.{value}" for value in DIT)],
        "train_dit_512": [f"sampling.sdf_resolution={LOW}", "sampling.structure_steps=2", "sampling.latent_steps=2"],
        "train_dit_1024": [f"sampling.fine.sdf_resolution={HIGH}", "sampling.fine.steps=2"],
    }
    for name, resolution in RESOLUTIONS.items():
        own[f"encode_latents_{name}"] = [f"resolution={resolution}"]
        own[f"train_dit_{name}"] = [*own.get(f"train_dit_{name}", []), f"resolution={resolution}"]
    run = [f"run.steps={steps}", "run.device=cpu", "run.workers=0", "run.tensorboard=false", "run.log_every=1"]
    others = ["encode_latents.device=cpu", "encode_latents.workers=0"]
    return [*run, *others, *(f"{stage}.{value}" for stage, values in own.items() for value in values)]
