"""Pretrained DINOv2 with registers -> `ImageEncoder`: from the torch.hub file or a local folder of transformers."""

import logging
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..networks.image_encoder import ImageEncoder, ImageEncoderConfig
from ..storage.one_line import one_line
from .checkpoint import MAX_NAMES, check_state, read_tensors
from .config import OfficialError

HEAD_DIM = 64  # of every published DINOv2
NAMES = (  # patterns of torch.hub's names: those of the published transformers weights
    (r"^(cls_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)
UNUSED = {"mask_token", "norm.weight", "norm.bias"}  # used in pretraining only; the last norm, which conditioning omits


def load_dinov2(path: Path) -> ImageEncoder:
    """Load the encoder from a torch.hub file (dinov2_vitl14_reg4_pretrain.pth) or from a transformers folder.

    Raises:
        OfficialError: the file is missing, damaged, or not DINOv2 with registers.
    """
    if not path.is_dir():
        return from_hub_state_dict(read_tensors(path), path)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # an error says what is wrong
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageEncoder.from_dinov2(path)
    except Exception as error:  # transformers raises anything for a damaged folder
        raise OfficialError(f"{path}: {one_line(error)[:200]}") from None
    finally:
        logging.disable(level)


def from_hub_state_dict(hub: dict[str, Tensor], file: Path) -> ImageEncoder:
    """Build the encoder from torch.hub's state dict: rename its tensors, and split the projection of q, k and v.

    Args:
        file: named in messages.

    Raises:
        OfficialError: the state dict is not that of DINOv2 with registers.
    """
    check_state(file, "the file", hub)
    config = _config_of(hub, file)
    state = {}
    for key, tensor in hub.items():
        if key in UNUSED:
            continue
        name = key
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            if tensor.shape[:1] != (3 * config.hidden_size,):
                raise OfficialError(f"{file} has misshapen tensors: {key} {tuple(tensor.shape)}")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.clone()
        else:
            state[name] = tensor
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    expected = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    for problem, names in (
        ("misses", sorted(expected.keys() - state.keys())),
        ("has unexpected", sorted(state.keys() - expected.keys())),
        ("has misshapen", [key for key in state if key in expected and tuple(state[key].shape) != expected[key]]),
    ):
        if names:
            raise OfficialError(f"{file} {problem} tensors: {', '.join(names[:MAX_NAMES])}")
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)


def _config_of(hub: dict[str, Tensor], file: Path) -> ImageEncoderConfig:
    """Read the sizes off the shapes."""
    try:
        hidden_size, patch_size = hub["cls_token"].shape[-1], hub["patch_embed.proj.weight"].shape[-1]
        patches = round((hub["pos_embed"].shape[1] - 1) ** 0.5)
        return ImageEncoderConfig(
            image_size=patches * patch_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=len([key for key in hub if key.endswith(".attn.qkv.weight")]),
            num_heads=hidden_size // HEAD_DIM,
            mlp_ratio=hub["blocks.0.mlp.fc1.weight"].shape[0] // hidden_size,
            num_registers=hub["register_tokens"].shape[1],
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise OfficialError(f"{file} is not DINOv2 with registers, small to large ({error})") from None
