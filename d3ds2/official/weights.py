"""Translate the names and layouts of the released checkpoints to ours, and back.

Every `*_state_dict` takes the state dict of an official module and returns that of our module, ready for a strict
`load_state_dict`. Values keep their dtype. `NAMINGS[network].official(key)` is the official name of one of our keys.
"""

import re
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Naming:
    """Pairs of a piece of an official key and ours. A piece begins after a dot or at the start; `#` is a number.

    In `sparse` networks every official `….conv.` is a torchsparse convolution, which calls its weight kernel.
    """

    pairs: tuple[tuple[str, str], ...]
    sparse: bool = False

    def ours(self, key: str) -> str:
        """Translate an official key."""
        for official, ours in self.pairs:
            key = _substitute(official, ours, key)
        return re.sub(r"\.kernel$", ".weight", key) if self.sparse else key

    def official(self, key: str) -> str:
        """Translate one of our keys."""
        for official, ours in reversed(self.pairs):
            key = _substitute(ours, official, key)
        return re.sub(r"\.conv\.weight$", ".conv.kernel", key) if self.sparse else key


def _substitute(old: str, new: str, key: str) -> str:
    pattern = r"(?:^|(?<=\.))" + re.escape(old).replace(r"\#", r"(\d+)")
    parts = new.split("#")
    return re.sub(pattern, lambda match: "".join(map("".join, zip(parts, (*match.groups(), ""), strict=True))), key)


FEED_FORWARD = (("mlp.mlp.0.", "feed_forward.up."), ("mlp.mlp.2.", "feed_forward.down."))
DIT = (
    *FEED_FORWARD,
    ("t_embedder.", "time_embedder."),
    ("cond_proj.", "context_layer."),
    ("out_layer.", "output_layer."),
    ("adaLN_modulation.", "modulation.projection."),
    ("self_attn.", "self_attention."),
    ("cross_attn.", "cross_attention."),
    ("q_rms_norm.", "q_norm."),
    ("k_rms_norm.", "k_norm."),
)
SSA = (
    ("intra_block_pe", "block_position"),
    ("self_attn.proj_q.", "self_attn.to_q."),
    ("self_attn.proj_k.", "self_attn.to_k."),
    ("self_attn.proj_v.", "self_attn.to_v."),
    ("self_attn.proj_o.", "self_attn.to_out."),
    ("gate.0.", "gate."),
    ("compression_key.", "compress_k."),
    ("compression_value.", "compress_v."),
    ("act_layers.0.conv.", "pointwise."),
    ("act_layers.0.", "norm_in."),
    ("out_layers.0.conv.", "conv_in."),
    ("out_layers.1.", "norm_out."),
    ("out_layers.3.conv.", "conv_out."),
)
SDF_VAE = (
    *FEED_FORWARD,
    ("attn.", "attention."),
    ("encoder.input_layer1.", "encoder.sdf_layer."),
    ("encoder.downsample.#.act_layers.0.", "encoder.down_blocks.#.norm1."),
    ("encoder.downsample.#.out_layers.0.conv.", "encoder.down_blocks.#.conv1."),
    ("encoder.downsample.#.out_layers.1.", "encoder.down_blocks.#.norm2."),
    ("encoder.downsample.#.out_layers.3.conv.", "encoder.down_blocks.#.conv2."),
    ("encoder.downsample.#.skip_connection.conv.", "encoder.down_blocks.#.skip."),
    ("decoder.upsample.#.act_layers.0.conv.", "decoder.up_blocks.#.conv1."),
    ("decoder.upsample.#.out_layers.0.conv.", "decoder.up_blocks.#.conv2."),
)
STRUCTURE_VAE = (
    ("input_layer.", "input_conv."),
    ("middle_block.", "middle_blocks."),
    ("out_layer.0.", "out_norm."),
    ("out_layer.2.", "out_conv."),
)
REFINER = (
    ("unet3d1.", "unet."),
    ("latent_mlp.net.", "feature_mlp."),
    *((f"adaptive_conv{i}.0.", f"adaptive{i}.hidden_conv.") for i in (1, 2, 3)),
    *((f"adaptive_conv{i}.2.", f"adaptive{i}.weight_conv.") for i in (1, 2, 3)),
    ("conv_norm_out.", "out_norm."),
    ("conv_in.", "input_conv."),
    ("conv_out.", "output_conv."),
    ("mid_conv.", "middle_conv."),
    ("mid_block.resnets.", "middle_blocks."),
    ("down_blocks.#.resnets.#.", "down_blocks.#.#."),
    ("up_blocks.#.resnets.#.", "up_blocks.#.#."),
    ("conv_shortcut.", "shortcut."),
    ("down_blocks.#.downsamplers.0.conv.", "downsamples.#."),
    ("up_blocks.#.upsamplers.0.conv.", "upsamples.#."),
)
NAMINGS = {
    "structure_vae": Naming(STRUCTURE_VAE),
    "structure_dit": Naming(DIT),
    "latent_dit": Naming((*SSA, *DIT), sparse=True),
    "sdf_vae": Naming(SDF_VAE, sparse=True),
    "refiner": Naming(REFINER),
}


def structure_vae_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate DenseShapeVAE to `StructureVAE`."""
    return {NAMINGS["structure_vae"].ours(key): tensor for key, tensor in official.items()}


def structure_dit_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate DenseDiT to `StructureDiT`, which computes the buffer `pos_emb` itself."""
    return {NAMINGS["structure_dit"].ours(key): tensor for key, tensor in official.items() if key != "pos_emb"}


def latent_dit_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate SparseDiT to `LatentDiT`."""
    return {NAMINGS["latent_dit"].ours(key): our_layout(key, tensor) for key, tensor in official.items()}


def ssa_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the official SpatialSparseAttention to ours."""
    prefix = "self_attention."
    renamed = latent_dit_state_dict({f"self_attn.{key}": tensor for key, tensor in official.items()})
    return {key.removeprefix(prefix): tensor for key, tensor in renamed.items()}


def sdf_vae_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate SparseSDFVAE to `SDFVAE`."""
    return {NAMINGS["sdf_vae"].ours(key): our_layout(key, tensor) for key, tensor in official.items()}


def refiner_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate Voxel_RefinerXL to `Refiner`, and Voxel_RefinerXL_sign to `SignRefiner`."""
    return {NAMINGS["refiner"].ours(key): tensor for key, tensor in official.items()}


def our_layout(key: str, tensor: Tensor) -> Tensor:
    """Change a tensor of a sparse network to our layout.

    x runs fastest in official kernels (27, I, O), slowest in ours. A 1³ kernel (I, O) becomes its transpose, the
    weight of a Linear. The position table of a block (c, c, c, C) becomes flat, (c³, C). Other tensors pass unchanged.
    """
    if key.endswith("intra_block_pe") and tensor.ndim == 4:
        return tensor.flatten(0, 2)
    if key.endswith(".kernel") and tensor.ndim == 2:
        return tensor.t().contiguous()
    if key.endswith(".kernel") and tensor.ndim == 3 and len(tensor) == 27:
        return tensor.unflatten(0, (3, 3, 3)).permute(2, 1, 0, 3, 4).flatten(0, 2).contiguous()
    return tensor


def convolution(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Translate the key of a torchsparse convolution, and its tensor by `our_layout`.

    Keys other than `….conv.kernel` and `….conv.bias` pass unchanged.
    """
    return key.replace(".conv.bias", ".bias").replace(".conv.kernel", ".weight"), our_layout(key, tensor)
