"""Sharded weights (`run.sharded`): the ranks share weights, gradients, moments and the average instead of copying them.

FSDP2 (`fully_shard`) keeps a shard of every weight on each rank. It gathers the whole weights of a block when the block
runs, forward and backward, and sums the gradients over the ranks into the shards. Every rank must therefore compute
equally many parts in a step: where a batch has fewer samples than parts, a rank computes a stand-in of weight zero
(`training.data.parts`).

One GPU holds weights, gradients, moments and average of the paper's networks in 9 GiB. Sharding them leaves more memory
for tokens, and costs time to gather the weights (benchmarks/scaling.py).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import Ranks, connected


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Shard a network in place, or each network of a ModuleDict: each block by itself, and the rest.

    A block is a member of an nn.ModuleList. Weights are whole while `forward`, `encode` or `decode` of a network runs.
    """
    from torch.distributed.device_mesh import DeviceMesh  # imported here: it takes a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = DeviceMesh.from_group(dist.group.WORLD if ranks.group is None else ranks.group, ranks.device.type)
    for network in model.values() if isinstance(model, nn.ModuleDict) else [model]:
        stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        for unit in [*(block for stack in reversed(stacks) for block in stack), network]:
            fully_shard(unit, mesh=mesh)
            unit.set_gradient_divide_factor(1.0)  # parts are weighed already: gradients are sums, not means
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        for method in ("encode", "decode"):
            if hasattr(network, method):
                register_fsdp_forward_method(network, method)


def reshard(network: nn.Module) -> None:
    """Keep the shards alone again. A network that nothing is learnt from, as a frozen one, is whole until then."""
    for module in network.modules():
        if hasattr(module, "reshard"):  # as those have that `shard` has sharded
            module.reshard()


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a sharded network to an unsharded one. All ranks must call it."""
    sources, targets = source.state_dict(), target.state_dict()
    with connected():
        for name, tensor in targets.items():
            tensor.copy_(whole(sources[name]))


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor, of any shape, from its shards; return any other tensor itself. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_to_shard(values: Tensor, tensor: Tensor) -> None:
    """Copy whole values, of any shape, which every rank has, into a tensor of that shape or this rank's shard of it."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
