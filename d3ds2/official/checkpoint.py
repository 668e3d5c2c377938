"""A released .ckpt file -> the tensors of one of our networks, each accounted for.

Nothing but tensors is ever unpickled, and every byte is checked against the archive's checksums first.
"""

import pickle  # for the name of its error alone
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import OfficialError, describe
from .weights import NAMINGS, our_layout

MAX_NAMES = 12  # of the keys of one kind that a message lists


def read_tensors(file: Path) -> dict:
    """What `torch.save` wrote, if that is nothing but tensors in dicts; the tensors stay on disk until they are used.

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
        raise OfficialError(f"damaged file {file} ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(contents, dict):
        raise OfficialError(f"{file} holds a {type(contents).__name__}, expected a dict of tensors")
    return contents


def read_checkpoint(file: Path, parts: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a released checkpoint by part. Raises OfficialError as `read_tensors`, or for other parts."""
    contents = read_tensors(file)
    if contents.keys() != {*parts}:
        found = ", ".join(sorted(map(str, contents))[:MAX_NAMES]) or "nothing"
        raise OfficialError(f"{file}: expected {' and '.join(parts)} at the top, got {found}")
    for part, state in contents.items():
        check_state(file, part, state)
    return contents


def check_state(file: Path, part: str, state: object) -> None:
    """See that a state dict is one. Raises OfficialError."""
    if not isinstance(state, dict) or not state:
        raise OfficialError(f"{file}: expected a state dict in {part}")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise OfficialError(f"{file}: expected a floating tensor in {part}, {key} is none")


def our_state_dict(network: str, module: nn.Module, official: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The official tensors by our names and in our layout.

    Args:
        network: whose `NAMINGS` apply.
        module: of ours (on "meta", say), which tells names and shapes.
        official: the state dict of the official module.

    Raises:
        OfficialError: missing, unexpected or misshapen tensors, by their official names.
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
    """What tells v1.0 from v1.1, by the tensors of a sparse transformer: `VERSIONS` has it."""
    pooled_conv = any("compression_key.out_layers" in key for key in official)
    table = official.get("blocks.0.self_attn.intra_block_pe")
    block = 0 if table is None or table.ndim < 1 else len(table)
    return pooled_conv, "cond_proj.weight" in official, block


def check_version(official: dict[str, Tensor], expected: tuple[bool, bool, int], version: str, file: Path) -> None:
    """Raises OfficialError where the tensors of a sparse transformer are not of the version that config.yaml says."""
    if (found := form_of(official)) != expected:
        has, wanted = describe(*found), describe(*expected)
        raise OfficialError(f"{file} is not of {version}, as config.yaml says: it has {has} instead of {wanted}")


def refiner_widths(official: dict[str, Tensor], file: Path) -> tuple[int, ...]:
    """Channels of the levels of a refiner, which its configuration does not tell."""
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
        raise OfficialError(f"damaged file {file} (truncated, or no archive)") from None
    if damaged is not None:
        raise OfficialError(f"damaged file {file} (bytes of {damaged} are not those that were written)")


def _check_position(module: nn.Module, tensor: Tensor, file: Path) -> None:
    """The official transformer keeps its position embedding among its weights; ours computes the same one."""
    position = module.position
    if tensor.shape != position.shape or (tensor.float() - position).abs().max() > 2e-3:  # it may be in float16
        raise OfficialError(f"{file}: pos_emb {tuple(tensor.shape)} is not the embedding of the grid")


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} tensors: {', '.join(names[:MAX_NAMES])}{rest}"
