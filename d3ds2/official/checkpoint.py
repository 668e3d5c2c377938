"""A released .ckpt file -> the tensors of one of our networks, with none missing and none left over.

Only tensors are ever unpickled, and every byte is first checked against the archive's checksums.
"""

import pickle  # only for the class of its error
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks.structure_dit import grid_embedding
from ..storage.one_line import one_line
from .config import OfficialError, describe
from .weights import NAMINGS, our_layout

MAX_NAMES = 12  # keys that a message lists at most


def read_tensors(file: Path) -> dict:
    """Read what `torch.save` wrote, if it is nothing but tensors in dicts; they stay on disk until they are used.

    Raises:
        OfficialError: the file is missing, truncated, damaged, or holds more than tensors.
    """
    if not file.is_file():
        raise OfficialError(f"missing file {file}")
    try:
        with open(file, "rb") as stream:
            is_archive = stream.read(2) == b"PK"
        if is_archive:
            _check_archive(file)
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise OfficialError(
                f"{file} holds more than tensors ({found[1]}) and was not read: it could run code"
            ) from None
        raise OfficialError(f"damaged file {file} (not a checkpoint)") from None
    except OfficialError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise OfficialError(f"damaged file {file} ({one_line(error)[:200]})") from None
    if not isinstance(contents, dict):
        raise OfficialError(f"{file} holds a {type(contents).__name__}, expected a dict of tensors")
    return contents


def read_checkpoint(file: Path, parts: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Read the state dicts of a released checkpoint, by part.

    Raises:
        OfficialError: as `read_tensors`; or the file has other parts, or one that is no state dict.
    """
    contents = read_tensors(file)
    if contents.keys() != {*parts}:
        found = ", ".join(sorted(map(str, contents))[:MAX_NAMES]) or "nothing"
        raise OfficialError(f"{file}: expected {' and '.join(parts)} at the top, got {found}")
    for part, state in contents.items():
        check_state(file, part, state)
    return contents


def check_state(file: Path, part: str, state: object) -> None:
    """Check that `state` is a state dict of floating tensors. Raises OfficialError if not."""
    if not isinstance(state, dict) or not state:
        raise OfficialError(f"{file}: expected a state dict in {part}")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise OfficialError(f"{file}: expected floating tensors in {part}, {key} is not one")


def our_state_dict(network: str, module: nn.Module, official: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the official tensors with our names and in our layout.

    Args:
        network: a key of `NAMINGS`.
        module: our network (it may lie on "meta"), for its names and shapes.
        official: the state dict of the official module.
        file: named in messages.

    Raises:
        OfficialError: tensors are missing, unexpected or misshapen; the message has their official names.
    """
    naming = NAMINGS[network]
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    ours, unexpected, misshapen = {}, [], []
    for key, tensor in official.items():
        if key == "pos_emb" and network == "structure_dit":
            _check_position(module, tensor, file)
            continue
        name, laid_out = naming.ours(key), our_layout(key, tensor) if naming.sparse else tensor
        if name not in expected or naming.official(name) != key:
            unexpected.append(key)
        elif tuple(laid_out.shape) != expected[name]:
            misshapen.append(f"{key} {tuple(tensor.shape)} where the network has {expected[name]}")
        else:
            ours[name] = laid_out
    if network == "structure_dit" and "pos_emb" not in official:
        raise OfficialError(f"{file} misses tensors: pos_emb")
    found = {naming.ours(key) for key in official}
    missing = [naming.official(name) for name in expected if name not in found]
    problems = [
        f"{problem} {_list(names)}"
        for problem, names in (("misses", missing), ("has unexpected", unexpected), ("has misshapen", misshapen))
        if names
    ]
    if problems:
        raise OfficialError(f"{file} {'; '.join(problems)}")
    return ours


def form_of(official: dict[str, Tensor]) -> tuple[bool, bool, int]:
    """Return the key of `VERSIONS` that the tensors of a sparse transformer show."""
    pooled_conv = any("compression_key.out_layers" in key for key in official)
    table = official.get("blocks.0.self_attn.intra_block_pe")
    block = 0 if table is None or table.ndim < 1 else len(table)
    return pooled_conv, "cond_proj.weight" in official, block


def check_version(official: dict[str, Tensor], expected: tuple[bool, bool, int], version: str, file: Path) -> None:
    """Check that the tensors of a sparse transformer are of the version in config.yaml. Raises OfficialError if not."""
    if (found := form_of(official)) != expected:
        has, wanted = describe(*found), describe(*expected)
        raise OfficialError(f"{file} is not of {version}, as config.yaml says: it has {has} instead of {wanted}")


def refiner_widths(official: dict[str, Tensor], file: Path) -> tuple[int, ...]:
    """Return the channels of a refiner's levels, which config.yaml does not have. Raises OfficialError if none."""
    widths = []
    while (kernel := official.get(f"unet3d1.down_blocks.{len(widths)}.resnets.0.conv1.weight")) is not None:
        widths.append(len(kernel) if kernel.ndim else 0)
    if not widths:
        raise OfficialError(f"{file} misses tensors: unet3d1.down_blocks.0.resnets.0.conv1.weight")
    return tuple(widths)


def _check_archive(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError):
        raise OfficialError(f"damaged file {file} (truncated, or not an archive)") from None
    if damaged is not None:
        raise OfficialError(f"damaged file {file} (the checksum of {damaged} does not match)")


def _check_position(module: nn.Module, tensor: Tensor, file: Path) -> None:
    """Check the position embedding, which the official transformer keeps among its weights and ours computes."""
    resolution, channels = module.config.resolution, module.config.hidden_size
    same_shape = tensor.shape == (resolution**3, channels)
    # it may be in float16
    if not same_shape or (tensor.float() - grid_embedding(resolution, channels, "cpu")).abs().max() > 2e-3:
        raise OfficialError(f"{file}: pos_emb {tuple(tensor.shape)} is not the embedding of the grid")


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} tensors: {', '.join(names[:MAX_NAMES])}{rest}"
