"""Low-rank adapters (LoRA) on the attention of a network: few weights learn, those of the network stay.

An adapted layer computes W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank); B is zero at first. Before
export, the adapters are added to the weights, so the model folder is as any other. Needs peft (extra `lora`).
"""

import copy
from dataclasses import dataclass
from typing import Literal

from torch import nn

# Layers that always compute by their own `forward`: others have their weights read by a kernel, past the adapter.
Target = Literal["to_q", "to_k", "to_v", "to_kv", "to_qkv", "to_out", "up"]


@dataclass(frozen=True)
class LoRAConfig:
    """Which adapters to train; the defaults are ours [D]."""

    rank: int = 0  # of each adapter; 0: none, all weights of the network learn
    alpha: int = 16  # the factor of an adapter is alpha / rank
    targets: tuple[Target, ...] = ("to_q", "to_k", "to_v", "to_kv", "to_qkv", "to_out")  # layers that get one

    def __post_init__(self):
        if self.rank < 0 or not self.targets:
            raise ValueError(f"expected a rank of at least 0 and some targets, got {self.rank} and {self.targets}")


def add_adapters(network: nn.Module, config: LoRAConfig) -> None:
    """Put adapters on a network in place, and freeze all else; nothing changes with rank 0.

    Raises:
        ValueError: peft is not installed, or the network has none of the targets.
    """
    if not config.rank:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model  # imported here: it is slow, and may not be installed
    except ImportError:
        raise ValueError('lora.rank needs peft: pip install "peft", or the extra `lora`') from None
    adapters = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=[*config.targets])
    inject_adapter_in_model(adapters, network)


def merged(network: nn.Module) -> nn.Module:
    """Return a copy of a network with its adapters added to its weights; without adapters, the network itself."""
    if not any("lora_" in name for name, _ in network.named_parameters()):
        return network
    from peft.tuners.lora import LoraLayer

    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    return network
