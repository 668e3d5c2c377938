"""How fast a run computes: tokens per second, and model FLOPs utilisation (MFU).

MFU is the share of the GPUs' peak that a run reaches. A step counts as 6 FLOPs for each token and each weight that
multiplies it: 2 in the forward pass and 4 in the backward pass. Products of queries and keys, image tokens and
recomputation do not count, so the true use is higher. For a GPU that `training.gpus` does not list, in fp32, and for
the two VAEs, whose convolutions do as much as a shape has neighbours, there is no MFU.
"""

import torch
from torch import nn

from d3ds2.kernels.devices import abilities, trains_in_bf16
from d3ds2.networks.latent_dit import LatentDiT
from training.gpus import find_gpu

# parts of the two DiTs that see samples or image tokens, not tokens
NOT_OF_TOKENS = ("time_embedder", "modulation", "context_layer", "cross_attention.to_kv")


def token_weights(dit: nn.Module) -> int:
    """Count the weights of a DiT's matrices that multiply every token; 0 if its blocks see packed tokens."""
    if isinstance(dit, LatentDiT) and dit.config.packing_channels:
        return 0
    return sum(
        module.weight.numel()
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in NOT_OF_TOKENS)
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak of a device in operations per second; None if it is not known or not used."""
    if precision != "bf16" or not trains_in_bf16(device):
        return None
    gpu = find_gpu(abilities(device).name)
    return None if gpu is None else 1e12 * gpu.bf16_tflops


def speeds(
    counts: dict[str, float], seconds: float, weights: int = 0, peak: float | None = None, ranks: int = 1
) -> dict[str, float]:
    """Return tokens or samples per second, and MFU where it is known.

    Args:
        counts: means of a step's metrics, "tokens" or "samples" among them.
        seconds: of a step.
        weights: `token_weights`; 0 if they are not known.
        peak: of the device of a rank, in operations per second.
    """
    found = {f"{name}_per_second": counts[name] / seconds for name in ("tokens", "samples") if name in counts}
    if weights and peak and "tokens" in counts:
        found["mfu"] = 6 * weights * found["tokens_per_second"] / (peak * ranks)
    return found
