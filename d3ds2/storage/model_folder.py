"""The folder of a model: `config.json` with the dataclasses of its networks, and a `<network>.safetensors` for each.

    {"format": 1, "name": "tiny", "networks": {"sdf_vae": {"latent_channels": 16, ...}, ...}, "sampling": {...}}

A model has five networks; it may also have a second, finer stage (`fine_…`) and refiners of the SDF. No pickle is ever
read. `networks/model_files.py` builds, saves and loads the networks themselves.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .atomic_file import replacing
from .dataclass_values import from_dict
from .one_line import OneLineError, one_line

FORMAT = 1
NETWORKS = ("image_encoder", "structure_vae", "structure_dit", "latent_dit", "sdf_vae")  # every model has them
EXTRA_NETWORKS = ("fine_latent_dit", "fine_sdf_vae", "refiner", "fine_refiner")  # a model may have them
ALL_NETWORKS = NETWORKS + EXTRA_NETWORKS
MOST_STEPS = 10_000  # of a sampler
FINEST = 2048  # voxels along an edge of an SDF
LARGEST_CONFIG = 1 << 20  # bytes
FLOATS = ("F16", "BF16", "F32", "F64")  # the dtypes that a floating tensor may have in a file


class ModelFolderError(OneLineError):
    """A model folder that is missing, damaged, or of a format that cannot be read. The message is one line."""


@dataclass(frozen=True)
class FineSamplingConfig:
    """How to sample the second stage, whose structure is the voxelised mesh of the first.

    The defaults are those of the released pipeline (certainty B).
    """

    sdf_resolution: int = 1024
    steps: int = 15
    shift: float = 8.0
    guidance: float = 7.0

    def __post_init__(self):
        if not 64 <= self.sdf_resolution <= FINEST or self.sdf_resolution % 64:
            raise ValueError(
                f"expected a fine sdf_resolution divisible by 64 up to {FINEST}, got {self.sdf_resolution}"
            )
        if self.steps < 1 or self.shift <= 0:
            raise ValueError(f"expected at least one fine step and a positive shift, got {self.steps}, {self.shift}")
        _check_sampling(astuple(self), self.steps)


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample a model. The defaults are those of the released pipeline (certainty B) at 512³ and below.

    Attributes:
        structure_threshold: probability from which a voxel is occupied; None: that of the structure VAE.
        structure_widening: layers of voxels that are added around the structure, for a latent DiT that leaves out what
            has no surface.
        structure_mirrored: a structure of one step is also predicted from the mirrored picture, and mirrored back; the
            mean of both logits decides. Samples of several steps are not averaged.
        level: value of the SDF at the surface, 0 if the network learned a signed distance.
        surface_smoothing: times that the decoded SDF is smoothed, see `SDFBlocks.smoothed`.
        least_inside: share of a sample's decoded voxels that lie inside at least, see `SDFBlocks.filled`.
        half_times: round the times that the transformers receive to float16.
        fine: the second stage, if the model has one.
    """

    sdf_resolution: int = 256  # voxels along an edge of the SDF; the latents have an eighth of that
    structure_steps: int = 50
    structure_shift: float = 6.0
    structure_guidance: float = 7.0
    structure_threshold: float | None = None
    structure_widening: int = 0
    structure_mirrored: bool = False
    latent_steps: int = 30
    latent_shift: float = 6.0
    latent_guidance: float = 7.0
    level: float = 0.0
    surface_smoothing: int = 0
    least_inside: float = 0.0
    half_times: bool = False
    fine: FineSamplingConfig | None = None

    def __post_init__(self):
        if not 64 <= self.sdf_resolution <= FINEST or self.sdf_resolution % 64:
            raise ValueError(f"expected sdf_resolution divisible by 64 up to {FINEST}, got {self.sdf_resolution}")
        if min(self.structure_steps, self.latent_steps) < 1:
            raise ValueError(f"expected at least one step, got {self.structure_steps} and {self.latent_steps}")
        if min(self.structure_shift, self.latent_shift) <= 0:
            raise ValueError(f"expected positive shifts, got {self.structure_shift} and {self.latent_shift}")
        if self.structure_threshold is not None and not 0 < self.structure_threshold < 1:
            raise ValueError(f"expected a structure_threshold in (0, 1), got {self.structure_threshold}")
        if not 0 <= self.structure_widening <= 4:
            raise ValueError(f"expected structure_widening from 0 to 4, got {self.structure_widening}")
        if not 0 <= self.least_inside < 1:
            raise ValueError(f"expected least_inside in [0, 1), got {self.least_inside}")
        if not 0 <= self.surface_smoothing <= 32:
            raise ValueError(f"expected surface_smoothing from 0 to 32, got {self.surface_smoothing}")
        if not -1 < self.level < 1:
            raise ValueError(f"expected a level in (-1, 1), got {self.level}")
        _check_sampling(astuple(self), max(self.structure_steps, self.latent_steps))

    def reads_mirrored(self, structure_steps: int | None = None) -> bool:
        """Whether a structure of so many steps (default: the model's) is predicted from the mirrored picture too."""
        return self.structure_mirrored and (structure_steps or self.structure_steps) == 1


def _check_sampling(values: Iterable[Any], steps: int) -> None:
    if not_finite := [value for value in values if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(f"expected finite numbers, got {not_finite[0]}")
    if steps > MOST_STEPS:
        raise ValueError(f"expected at most {MOST_STEPS} steps, got {steps}")


def write_network(
    folder: str | Path, name: str, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write `<name>.safetensors` and the network's entry of config.json; create the folder if it is missing.

    Args:
        config: the dataclass that describes the network.
        tensors: its state dict.
        dtype: of the floating tensors in the file (torch.float16 halves it); default: the one that each has.

    Raises:
        ValueError: a value is not finite in `dtype`.
        ModelFolderError: the folder has a config.json that cannot be read.
        OSError: the folder cannot be written to.
    """
    written = {}
    for key, tensor in tensors.items():
        target = dtype if tensor.is_floating_point() else None
        written[key] = tensor.detach().to("cpu", target, copy=True).contiguous()
        if not written[key].isfinite().all():
            raise ValueError(f"expected finite values in {name}, {key} is not in {written[key].dtype}")
    folder, settings = Path(folder), _settings_to_change(folder)
    settings["networks"][name] = asdict(config)
    with replacing(folder / f"{name}.safetensors") as temporary:
        try:
            save_file(written, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"cannot write {folder / name}.safetensors ({one_line(error)})") from None
    _write_settings(folder, settings)


def save_settings(folder: str | Path, name: str, sampling: SamplingConfig) -> None:
    """Write the model's name and how to sample it into config.json; create the folder if it is missing.

    Raises:
        ModelFolderError: the folder has a config.json that cannot be read.
        OSError: the folder cannot be written to.
    """
    settings = _settings_to_change(folder)
    _write_settings(Path(folder), settings | {"name": name, "sampling": asdict(sampling)})


def load_settings(folder: str | Path) -> tuple[str, SamplingConfig]:
    """Return the name of the model in a folder and how to sample it.

    Raises:
        ModelFolderError: the folder or its config.json is missing or damaged, or a config key is unknown.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    sampling = _from_dict(SamplingConfig, settings.get("sampling", {}), "sampling.", folder)
    name = settings.get("name", folder.name)
    if not isinstance(name, str):
        raise ModelFolderError(f"{folder / 'config.json'}: name: expected a text, got {name!r}")
    return name, sampling


def network_names(folder: str | Path) -> set[str]:
    """Return the names of the networks in a model folder. Raises as `load_settings`."""
    return {*_read_settings(Path(folder))["networks"]}


def read_config(folder: str | Path, name: str, config_class: type) -> Any:
    """Return a network's entry of config.json as an instance of its dataclass.

    Raises:
        ModelFolderError: as `load_settings`; or the model has no such network.
    """
    folder = Path(folder)
    networks = _read_settings(folder)["networks"]
    if name not in networks:
        raise ModelFolderError(f"the model in {folder} has no {name}; it has {', '.join(networks) or 'none'}")
    return _from_dict(config_class, networks[name], f"networks.{name}.", folder)


def read_tensors(folder: str | Path, name: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict in `<name>.safetensors`, on the CPU.

    Nothing is read before the names, shapes and dtypes in the file's header are those that are expected.

    Args:
        expected: all tensors of the network, of any shapes, by key; they may lie on "meta".

    Raises:
        ModelFolderError: the file is missing or damaged, a tensor is missing, unexpected, misshapen or of another kind
            of number, or a value is not finite.
    """
    file = Path(folder) / f"{name}.safetensors"
    try:
        if not file.is_file():
            raise ModelFolderError(f"missing file {file}")
        _check_header(file, expected)
        tensors = load_file(file)
    except ModelFolderError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelFolderError(f"damaged file {file} ({one_line(error)})") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            raise ModelFolderError(f"{file} has values that are not finite: {key}")
    return tensors


def _check_header(file: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare the header of a file with tensors, whose values are not read."""
    with safe_open(file, "pt") as header:
        entries = {key: header.get_slice(key) for key in header.keys()}  # noqa: SIM118
        found = {key: (tuple(entry.get_shape()), entry.get_dtype()) for key, entry in entries.items()}
    misshapen, misfit = [], []
    for key, tensor in expected.items():
        shape, dtype = found.get(key, (tuple(tensor.shape), FLOATS[0]))
        if shape != tuple(tensor.shape):
            misshapen.append(f"{key} {shape} instead of {tuple(tensor.shape)}")
        if dtype not in FLOATS:
            misfit.append(f"{key} of {dtype} instead of {', '.join(FLOATS)}")
    for problem, names in (
        ("misses", sorted(expected.keys() - found.keys())),
        ("has unexpected", sorted(found.keys() - expected.keys())),
        ("has misshapen", misshapen),
        ("has no floats in", misfit),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelFolderError(f"{file} {problem} tensors: {', '.join(names[:3])}{rest}")


def _settings_to_change(folder: str | Path) -> dict[str, Any]:
    """Return config.json, or an empty one where there is none yet; create the folder if it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _read_settings(folder) if (folder / "config.json").exists() else {"format": FORMAT, "networks": {}}


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return config.json after the checks that the config dataclasses do not make."""
    file = folder / "config.json"
    try:
        if not folder.is_dir():
            raise ModelFolderError(f"no model folder {folder}")
        if not file.is_file():
            raise ModelFolderError(f"not a model folder: no config.json in {folder}")
        if file.stat().st_size > LARGEST_CONFIG:
            raise ModelFolderError(f"expected a config.json of at most {LARGEST_CONFIG:,} bytes: {file}")
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ModelFolderError:
        raise
    except OSError as error:
        raise ModelFolderError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"damaged file {file} ({one_line(error)})") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ModelFolderError(f"expected a model of format {FORMAT} in {file}")
    if unknown := sorted(settings.keys() - {"format", "name", "networks", "sampling"}):
        raise ModelFolderError(f"unknown key {unknown[0]} in {file}")
    networks = settings.setdefault("networks", {})
    if not isinstance(networks, dict):
        raise ModelFolderError(f"networks: expected a table, got {networks!r} in {file}")
    if unknown := sorted(networks.keys() - {*ALL_NETWORKS}):
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
        raise ModelFolderError(f"{folder / 'config.json'}: {one_line(error)}") from None
