"""The networks of a model, one module each; `network_classes` imports only the module that it is asked for."""

import importlib

CLASSES = {  # name in a model folder: module, config dataclass, network
    "image_encoder": ("image_encoder", "ImageEncoderConfig", "ImageEncoder"),
    "structure_vae": ("structure_vae", "StructureVAEConfig", "StructureVAE"),
    "structure_dit": ("structure_dit", "StructureDiTConfig", "StructureDiT"),
    "latent_dit": ("latent_dit", "LatentDiTConfig", "LatentDiT"),
    "sdf_vae": ("sdf_vae", "SDFVAEConfig", "SDFVAE"),
    "fine_latent_dit": ("latent_dit", "LatentDiTConfig", "LatentDiT"),
    "fine_sdf_vae": ("sdf_vae", "SDFVAEConfig", "SDFVAE"),
    "refiner": ("refiner", "RefinerConfig", "Refiner"),
    "fine_refiner": ("refiner", "SignRefinerConfig", "SignRefiner"),
}


def network_classes(name: str) -> tuple[type, type]:
    """Return the config dataclass and the `nn.Module` class of a network.

    Raises:
        ValueError: no network has that name.
    """
    if name not in CLASSES:
        raise ValueError(f"expected a network of {', '.join(CLASSES)}, got {name!r}")
    module, config, network = CLASSES[name]
    found = importlib.import_module(f".{module}", __name__)
    return getattr(found, config), getattr(found, network)
