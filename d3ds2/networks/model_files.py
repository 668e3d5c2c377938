"""Save and load the networks of a model folder; `storage/model_folder.py` describes its format."""

from pathlib import Path

import torch
from torch import nn

from ..storage.model_folder import (
    ALL_NETWORKS,
    NETWORKS,
    SamplingConfig,
    load_settings,
    network_names,
    read_config,
    read_tensors,
    write_network,
)
from . import network_classes


def save_network(folder: str | Path, name: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write `<name>.safetensors` and the network's entry of config.json; create the folder if it is missing.

    Args:
        module: has its dataclass in `module.config`.
        dtype: of the floating tensors in the file (torch.float16 halves its size). Default: they keep theirs.

    Raises:
        ValueError: the module is not of the class that `name` stands for, or a value is not finite in `dtype`.
        ModelFolderError: the folder has a config.json that cannot be read.
        OSError: the folder cannot be written to.
    """
    config_class, network_class = network_classes(name)
    if not isinstance(module, network_class) or not isinstance(module.config, config_class):
        raise ValueError(f"expected a {network_class.__name__} for {name}, got a {type(module).__name__}")
    write_network(folder, name, module.config, module.state_dict(), dtype)


def load_network(
    folder: str | Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a network from config.json and load its weights, in evaluation mode, without gradients.

    Raises:
        ModelFolderError: a folder or file is missing or damaged, a config key is unknown, or a tensor is missing,
            unexpected, misshapen or not finite.
        ValueError: no network has that name.
    """
    config_class, network_class = network_classes(name)
    config = read_config(folder, name, config_class)
    with torch.device("meta"):  # no time is spent on random weights
        module = network_class(config)
    module.load_state_dict(read_tensors(folder, name, module.state_dict()), assign=True)
    return module.to(device, dtype).eval().requires_grad_(False)


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, nn.Module], SamplingConfig]:
    """Return a model's networks by name, the five and any extra ones, and its sampling config.

    The networks of a second stage are left out until config.json says how to sample it.

    Raises as `load_network`.
    """
    sampling, stored = load_settings(folder)[1], network_names(folder)
    if sampling.fine is None:  # a second stage that is still in training
        stored = {name for name in stored if not name.startswith("fine_")}
    names = [name for name in ALL_NETWORKS if name in NETWORKS or name in stored]
    return {name: load_network(folder, name, device, dtype) for name in names}, sampling
