"""Average the weights of models that were trained one after the other, network by network.

    python -m training.average_models training/configs/average_models.toml 'models=["models/a", "models/b", "models/c"]'

Weights on the way from one stretch of training to the next often fit unseen shapes better than those at its ends
(Wortsman et al. 2022, "Model soups", arXiv:2203.05482). `networks` names those that are averaged, by default all of the
first model; the others, the name and the sampling settings are those of the first model. The averaged networks must
have the same sizes in all models. Nothing is written before all is read and averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from d3ds2.networks import network_classes
from d3ds2.networks.model_files import load_network
from d3ds2.storage.model_folder import load_settings, network_names, read_config, save_settings, write_network
from training.command import run_command
from training.run_folder import exporting

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class AverageModelsConfig:
    models: tuple[str, ...] = field(default_factory=tuple)  # model folders
    weights: tuple[float, ...] = field(default_factory=tuple)  # one for each, of any sum; (): all the same
    networks: tuple[str, ...] = field(default_factory=tuple)  # to be averaged; (): all of the first model
    out: str = "models/average"  # the model folder to write; it may be one of `models`
    dtype: str = "float16"  # of the written weights

    def __post_init__(self):
        if len(self.models) < 2:
            raise ValueError(f"expected at least two models, got {len(self.models)}")
        if self.weights and len(self.weights) != len(self.models):
            raise ValueError(f"expected a weight for each of {len(self.models)} models, got {len(self.weights)}")
        if any(weight < 0 for weight in self.weights) or (self.weights and not sum(self.weights)):
            raise ValueError(f"expected weights that are not negative, and not all 0, got {[*self.weights]}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype of {sorted(DTYPES)}, got {self.dtype!r}")

    @property
    def shares(self) -> list[float]:
        """The weight of each model, of sum 1."""
        weights = self.weights or (1.0,) * len(self.models)
        return [weight / sum(weights) for weight in weights]


def average(tensors: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts with the same keys, of any shapes; sums are in float64.

    Tensors of integers are those of the first.
    """
    means = {}
    for key, value in tensors[0].items():
        if value.is_floating_point():
            parts = [share * one[key].double() for share, one in zip(shares, tensors, strict=True)]
            value = torch.stack(parts).sum(0).to(value.dtype)
        means[key] = value
    return means


def main(config: AverageModelsConfig) -> None:
    """Write the averaged model; print a line for each network.

    Raises:
        ModelFolderError: a model or one of its networks is missing or damaged.
        ValueError: a network has other sizes in another model.
        OSError: the folder cannot be written to.
    """
    folders = [Path(model) for model in config.models]
    present = network_names(folders[0])
    chosen = config.networks or tuple(sorted(present))
    settings, made = load_settings(folders[0]), {}
    for name in sorted({*chosen} | present):
        sizes = read_config(folders[0], name, network_classes(name)[0])
        sources = folders if name in chosen else folders[:1]
        for folder in sources[1:]:
            other = read_config(folder, name, network_classes(name)[0])
            if other != sizes:
                raise ValueError(f"expected {name} of the same sizes in {folders[0]} and {folder}, got others")
        dicts = [load_network(folder, name).state_dict() for folder in sources]
        made[name] = sizes, average(dicts, config.shares if len(sources) > 1 else [1.0])
    with exporting(config.out):
        for name, (sizes, tensors) in made.items():
            write_network(config.out, name, sizes, tensors, DTYPES[config.dtype])
            print(f"{name}: {f'mean of {len(folders)} models' if name in chosen else f'from {folders[0]}'}")
        save_settings(config.out, *settings)


if __name__ == "__main__":
    run_command(main, AverageModelsConfig)
