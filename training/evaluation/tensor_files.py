"""Weights of other people's networks, from files that the user gives."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_tensors(file: str | Path) -> dict:
    """Read a file of torch.save, or of safetensors by its ending, without running code from it.

    Raises:
        ValueError: the file is damaged, or holds something else.
        OSError: it cannot be read.
    """
    try:
        if str(file).endswith(".safetensors"):
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # arguments of the script that trained it
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"damaged file {file} ({reason})") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected named tensors in {file}, got {type(found).__name__}")
    return found


def under(tensors: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_tensors(network: nn.Module, tensors: dict[str, Tensor], file: str | Path, what: str) -> None:
    """Copy tensors into a network; `what` says in the error which network was expected in the file.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"expected {what} in {file}: {str(error).splitlines()[-1].strip()[:200]}") from None
