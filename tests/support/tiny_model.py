"""Write a tiny model folder with random weights, which makes a mesh in a second. It tests the pipeline, not shapes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from d3ds2.networks import network_classes
from d3ds2.networks.model_files import save_network
from d3ds2.storage.model_folder import SamplingConfig, save_settings

SIZES = {
    "image_encoder": {"image_size": 56, "hidden_size": 24, "depth": 1, "num_heads": 2, "num_registers": 2},
    "structure_vae": {
        "latent_channels": 4,
        "encoder_widths": (8, 16),
        "decoder_widths": (16, 8),
        "encoder_res_blocks": 1,
        "encoder_middle_blocks": 1,
        "decoder_res_blocks": 1,
        "decoder_middle_blocks": 1,
        "threshold": 0.5,
    },
    "structure_dit": {
        "resolution": 4,
        "latent_channels": 4,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "context_size": 24,
    },
    "latent_dit": {"hidden_size": 64, "depth": 2, "num_heads": 32, "num_kv_heads": 2, "top_k": 4, "context_size": 24},
    "sdf_vae": {
        "hidden_size": 64,
        "num_heads": 2,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "group_norm_groups": 4,
        "latents_scale": 0.5,
        "latents_shift": 0.1,
    },
}
SAMPLING = SamplingConfig(sdf_resolution=64, structure_steps=3, latent_steps=2, structure_guidance=3.0)


def make_networks(seed: int = 0, **changes: dict) -> dict[str, nn.Module]:
    """Return the five networks by name; `changes` holds changed config values for each network, by its name."""
    torch.manual_seed(seed)
    networks = {}
    for name, sizes in SIZES.items():
        config_class, network_class = network_classes(name)
        networks[name] = network_class(config_class(**(sizes | changes.get(name, {})))).eval().requires_grad_(False)
    for name in ("structure_dit", "latent_dit"):  # new transformers return zero and would ignore the image
        for parameter in networks[name].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    networks["sdf_vae"].decoder.out_layer.weight.mul_(20)  # to get a surface instead of noise around zero
    return networks


def write_model(folder: Path, **changes: dict) -> Path:
    """Write the networks of `make_networks` as a model folder; return the folder."""
    for name, network in make_networks(**changes).items():
        save_network(folder, name, network)
    save_settings(folder, "random", SAMPLING)
    return folder


def draw_object(size: tuple[int, int] = (96, 80), mode: str = "RGBA") -> Image.Image:
    """Draw an orange ball with a blue box on it, on a transparent (RGBA) or white (RGB) background."""
    image = Image.new("RGBA", size, (255, 255, 255, 0))
    draw = ImageDraw.Draw(image)
    w, h = size
    draw.ellipse((w * 0.2, h * 0.25, w * 0.75, h * 0.9), fill=(230, 130, 30, 255))
    draw.rectangle((w * 0.4, h * 0.1, w * 0.6, h * 0.5), fill=(40, 60, 200, 255))
    if mode == "RGBA":
        return image
    white = Image.new("RGBA", size, "white")
    white.alpha_composite(image)
    return white.convert(mode)


def picture(count: int = 1, mode: str = "RGBA") -> torch.Tensor:
    """Return an IMAGE (count, 80, 96, 3 or 4) float32 in [0, 1]: the object, each a quarter turn after the last."""
    images = [np.asarray(draw_object(mode=mode).rotate(90 * i)) for i in range(count)]
    return torch.from_numpy(np.stack(images)).float() / 255
