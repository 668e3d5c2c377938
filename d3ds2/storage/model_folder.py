"""A model is a folder: `config.json` with the dataclasses of its networks, and one `<network>.safetensors` for each.

    {"format": 1, "name": "tiny", "networks": {"sdf_vae": {"latent_channels": 16, ...}, ...}, "sampling": {...}}

Five networks make a model; a second, finer stage (`fine_…`) and refiners of the SDF may stand beside them. No pickle is
ever read.
"""

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .atomic_file import replacing
from .dataclass_values import from_dict

FORMAT = 1
NETWORKS = {  # name: module, config, class
    "image_encoder": ("networks.image_encoder", "ImageEncoderConfig", "ImageEncoder"),
    "structure_vae": ("networks.structure_vae", "StructureVAEConfig", "StructureVAE"),
    "structure_dit": ("networks.structure_dit", "StructureDiTConfig", "StructureDiT"),
    "latent_dit": ("networks.latent_dit", "LatentDiTConfig", "LatentDiT"),
    "sdf_vae": ("networks.sdf_vae", "SDFVAEConfig", "SDFVAE"),
}
EXTRA_NETWORKS = {  # what a model may have beside those
    "fine_latent_dit": ("networks.latent_dit", "LatentDiTConfig", "LatentDiT"),
    "fine_sdf_vae": ("networks.sdf_vae", "SDFVAEConfig", "SDFVAE"),
    "refiner": ("networks.refiner", "RefinerConfig", "Refiner"),
    "fine_refiner": ("networks.refiner", "SignRefinerConfig", "SignRefiner"),
}
ALL_NETWORKS = NETWORKS | EXTRA_NETWORKS


class ModelFolderError(ValueError):
    """A model folder that is missing, damaged, or not of the form this version reads. The message is one line."""


@dataclass(frozen=True)
class FineSamplingConfig:
    """How the second stage is sampled: the mesh of the first one, voxelised again, tells its structure.

    The defaults are the released pipeline's (certainty B).
    """

    sdf_resolution: int = 1024
    steps: int = 15
    shift: float = 8.0
    guidance: float = 7.0

    def __post_init__(self):
        if self.sdf_resolution < 64 or self.sdf_resolution % 64:
            raise ValueError(f"expected a fine sdf_resolution divisible by 64, got {self.sdf_resolution}")
        if self.steps < 1 or self.shift <= 0:
            raise ValueError(f"expected at least one fine step and a positive shift, got {self.steps}, {self.shift}")


@dataclass(frozen=True)
class SamplingConfig:
    """How a model is sampled. The defaults are the released pipeline's (certainty B) at 512³ and below.

    `level` is the value of the SDF at the surface, 0 where the network learned a signed distance. `half_times`: the
    transformers are told times rounded to float16. `fine` is the second stage, if the model has one.
    """

    sdf_resolution: int = 256  # voxels along an edge of the SDF; latents at an eighth of it
    structure_steps: int = 50
    structure_shift: float = 6.0
    structure_guidance: float = 7.0
    latent_steps: int = 30
    latent_shift: float = 6.0
    latent_guidance: float = 7.0
    level: float = 0.0
    half_times: bool = False
    fine: FineSamplingConfig | None = None

    def __post_init__(self):
        if self.sdf_resolution < 64 or self.sdf_resolution % 64:
            raise ValueError(f"expected sdf_resolution divisible by 64, got {self.sdf_resolution}")
        if min(self.structure_steps, self.latent_steps) < 1:
            raise ValueError(f"expected at least one step, got {self.structure_steps} and {self.latent_steps}")
        if min(self.structure_shift, self.latent_shift) <= 0:
            raise ValueError(f"expected positive shifts, got {self.structure_shift} and {self.latent_shift}")
        if not -1 < self.level < 1:
            raise ValueError(f"expected a level in (-1, 1), got {self.level}")


def network_classes(name: str) -> tuple[type, type[nn.Module]]:
    """The config dataclass and the module of a network of this project."""
    if name not in ALL_NETWORKS:
        raise ValueError(f"expected a network of {', '.join(ALL_NETWORKS)}, got {name!r}")
    module, config, network = ALL_NETWORKS[name]
    found = importlib.import_module(f"...{module}", __name__)
    return getattr(found, config), getattr(found, network)


def save_network(folder: str | Path, name: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write `<name>.safetensors` and the network's entry of config.json; the folder is made if it is missing.

    Args:
        module: has its dataclass in `module.config`.
        dtype: of the file, for floating tensors (torch.float16 halves it); default: as they are.

    Raises:
        ValueError: the module is not of the class that `name` stands for, or a value does not fit into `dtype`.
    """
    config_class, network_class = network_classes(name)
    if not isinstance(module, network_class) or not isinstance(module.config, config_class):
        raise ValueError(f"expected a {network_class.__name__} for {name}, got a {type(module).__name__}")
    tensors = {}
    for key, tensor in module.state_dict().items():
        target = dtype if tensor.is_floating_point() else None
        tensors[key] = tensor.detach().to("cpu", target, copy=True).contiguous()
        if not tensors[key].isfinite().all():
            raise ValueError(f"expected finite values in {name}, {key} is not in {tensors[key].dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _read_settings(folder) if (folder / "config.json").exists() else {"format": FORMAT, "networks": {}}
    settings["networks"][name] = asdict(module.config)
    with replacing(folder / f"{name}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    _write_settings(folder, settings)


def save_settings(folder: str | Path, name: str, sampling: SamplingConfig) -> None:
    """Write the model's name and how it is sampled into config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _read_settings(folder) if (folder / "config.json").exists() else {"format": FORMAT, "networks": {}}
    _write_settings(folder, settings | {"name": name, "sampling": asdict(sampling)})


def load_network(
    folder: str | Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a network from config.json and load its weights, in evaluation mode, without gradients.

    Raises:
        ModelFolderError: a folder or file is missing or damaged, a config key is unknown, or a tensor is missing,
            unexpected or misshapen.
    """
    folder = Path(folder)
    config_class, network_class = network_classes(name)
    settings = _read_settings(folder)
    if name not in settings["networks"]:
        raise ModelFolderError(
            f"the model in {folder} has no {name}; it has {', '.join(settings['networks']) or 'none'}"
        )
    config = _from_dict(config_class, settings["networks"][name], f"networks.{name}.", folder)
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        raise ModelFolderError(f"missing file {file}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFolderError(f"damaged file {file} ({_one_line(error)})") from None
    with torch.device("meta"):  # no time is spent on random weights
        module = network_class(config)
    _check_tensors(file, {key: tensor.shape for key, tensor in module.state_dict().items()}, tensors)
    module.load_state_dict(tensors, assign=True)
    return module.to(device, dtype).eval().requires_grad_(False)


def load_settings(folder: str | Path) -> tuple[str, SamplingConfig]:
    """Name of the model in a folder and how it is sampled."""
    settings = _read_settings(Path(folder))
    return settings.get("name", Path(folder).name), _from_dict(
        SamplingConfig, settings.get("sampling", {}), "sampling.", Path(folder)
    )


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, nn.Module], SamplingConfig]:
    """All networks of a model folder by name, the five and those it has beside them, and how it is sampled.

    Raises as `load_network`.
    """
    sampling, extra = load_settings(folder)[1], network_names(folder) - NETWORKS.keys()
    names = [name for name in ALL_NETWORKS if name in NETWORKS or name in extra]
    return {name: load_network(folder, name, device, dtype) for name in names}, sampling


def network_names(folder: str | Path) -> set[str]:
    """The networks that a model folder has. Raises as `load_settings`."""
    return {*_read_settings(Path(folder))["networks"]}


def _check_tensors(file: Path, expected: dict[str, torch.Size], tensors: dict[str, torch.Tensor]) -> None:
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    for problem, names in (
        ("misses", sorted(expected.keys() - tensors.keys())),
        ("has unexpected", sorted(tensors.keys() - expected.keys())),
        ("has misshapen", misshapen),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelFolderError(f"{file} {problem} tensors: {', '.join(names[:3])}{rest}")


def _read_settings(folder: Path) -> dict[str, Any]:
    """config.json, checked as far as the config dataclasses do not check it themselves."""
    if not folder.is_dir():
        raise ModelFolderError(f"no model folder {folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise ModelFolderError(f"not a model folder: no config.json in {folder}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"damaged file {file} ({_one_line(error)})") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ModelFolderError(f"expected a model of format {FORMAT} in {file}")
    if unknown := sorted(settings.keys() - {"format", "name", "networks", "sampling"}):
        raise ModelFolderError(f"unknown key {unknown[0]} in {file}")
    networks = settings.setdefault("networks", {})
    if not isinstance(networks, dict):
        raise ModelFolderError(f"networks: expected a table, got {networks!r} in {file}")
    if unknown := sorted(networks.keys() - ALL_NETWORKS.keys()):
        raise ModelFolderError(f"unknown network {unknown[0]} in {file}")
    return settings


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    settings["networks"] = {name: settings["networks"][name] for name in ALL_NETWORKS if name in settings["networks"]}
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _from_dict(cls, values: Any, prefix: str, folder: Path):
    try:
        if not isinstance(values, dict):
            raise ValueError(f"{prefix[:-1]}: expected a table, got {values!r}")
        return from_dict(cls, values, prefix)
    except ValueError as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
