"""Names and layouts of the released checkpoints, as ours.

Every `*_state_dict` takes the state dict of one official module and returns that of ours, ready for a strict
`load_state_dict`. Values keep their dtype.
"""

import re

from torch import Tensor


def sdf_vae_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """SparseSDFVAE -> `SDFVAE`."""
    names = [
        (r"encoder\.input_layer1\.", "encoder.sdf_layer."),
        (r"encoder\.downsample\.(\d+)\.act_layers\.0\.", r"encoder.down_blocks.\1.norm1."),
        (r"encoder\.downsample\.(\d+)\.out_layers\.0\.", r"encoder.down_blocks.\1.conv1."),
        (r"encoder\.downsample\.(\d+)\.out_layers\.1\.", r"encoder.down_blocks.\1.norm2."),
        (r"encoder\.downsample\.(\d+)\.out_layers\.3\.", r"encoder.down_blocks.\1.conv2."),
        (r"encoder\.downsample\.(\d+)\.skip_connection\.", r"encoder.down_blocks.\1.skip."),
        (r"decoder\.upsample\.(\d+)\.act_layers\.0\.", r"decoder.up_blocks.\1.conv1."),
        (r"decoder\.upsample\.(\d+)\.out_layers\.0\.", r"decoder.up_blocks.\1.conv2."),
        (r"\.attn\.", ".attention."),
        (r"\.mlp\.mlp\.0\.", ".feed_forward.up."),
        (r"\.mlp\.mlp\.2\.", ".feed_forward.down."),
    ]
    return dict(convolution(rename(key, names), tensor) for key, tensor in official.items())


def structure_vae_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """DenseShapeVAE -> `StructureVAE`."""
    names = [
        (r"\.input_layer\.", ".input_conv."),
        (r"\.middle_block\.", ".middle_blocks."),
        (r"\.out_layer\.0\.", ".out_norm."),
        (r"\.out_layer\.2\.", ".out_conv."),
    ]
    return {rename(key, names): tensor for key, tensor in official.items()}


def rename(key: str, names: list[tuple[str, str]]) -> str:
    """`key` after all substitutions (pattern, replacement), in order."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def convolution(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Key and tensor of a torchsparse convolution (`….conv.kernel`, `….conv.bias`) as ours; others pass unchanged.

    Kernels (27, I, O) run x fastest there, x slowest here; a 1³ kernel (I, O) is the transpose of a Linear's weight.
    """
    key = key.replace(".conv.bias", ".bias")
    if not key.endswith(".conv.kernel"):
        return key, tensor
    is_linear = tensor.ndim == 2
    ours = tensor.t() if is_linear else tensor.unflatten(0, (3, 3, 3)).permute(2, 1, 0, 3, 4).flatten(0, 2)
    return key.replace(".conv.kernel", ".weight"), ours.contiguous()


def latent_dit_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """SparseDiT -> `LatentDiT`."""
    state = {}
    for key, tensor in official.items():
        if key.endswith("intra_block_pe"):
            tensor = tensor.flatten(0, 2)  # (c³, channels)
        key, tensor = convolution(rename(key, SSA_NAMES + DIT_NAMES), tensor)
        state[key] = tensor
    return state


def ssa_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """SpatialSparseAttention -> ours."""
    prefix = "self_attention."
    renamed = latent_dit_state_dict({f"self_attn.{key}": tensor for key, tensor in official.items()})
    return {key.removeprefix(prefix): tensor for key, tensor in renamed.items()}


def structure_dit_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """DenseDiT -> `StructureDiT`, which computes the buffer `pos_emb` itself."""
    return {rename(key, DIT_NAMES): tensor for key, tensor in official.items() if key != "pos_emb"}


def refiner_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Voxel_RefinerXL -> `Refiner`, Voxel_RefinerXL_sign -> `SignRefiner`."""
    return {rename(key, REFINER_NAMES): tensor for key, tensor in official.items()}


REFINER_NAMES = [
    (r"^unet3d1\.", "unet."),
    (r"^latent_mlp\.net\.", "feature_mlp."),
    (r"^adaptive_conv([123])\.0\.", r"adaptive\1.hidden_conv."),
    (r"^adaptive_conv([123])\.2\.", r"adaptive\1.weight_conv."),
    (r"\bconv_norm_out\.", "out_norm."),
    (r"\bconv_in\.", "input_conv."),
    (r"\bconv_out\.", "output_conv."),
    (r"\bmid_conv\.", "middle_conv."),
    (r"\bmid_block\.resnets\.", "middle_blocks."),
    (r"\bresnets\.", ""),
    (r"\bconv_shortcut\.", "shortcut."),
    (r"\bdown_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"downsamples.\1."),
    (r"\bup_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"upsamples.\1."),
]
DIT_NAMES = [
    (r"^t_embedder\.", "time_embedder."),
    (r"^cond_proj\.", "context_layer."),
    (r"^out_layer\.", "output_layer."),
    (r"\badaLN_modulation\.", "modulation.projection."),
    (r"\bself_attn\.", "self_attention."),
    (r"\bcross_attn\.", "cross_attention."),
    (r"\b([qk])_rms_norm\.", r"\1_norm."),
    (r"\bmlp\.mlp\.0\.", "feed_forward.up."),
    (r"\bmlp\.mlp\.2\.", "feed_forward.down."),
]
SSA_NAMES = [
    (r"\bintra_block_pe$", "block_position"),
    (r"\bproj_([qkv])\.", r"to_\1."),
    (r"\bproj_o\.", "to_out."),
    (r"\bgate\.0\.", "gate."),
    (r"\bcompression_key\.", "compress_k."),
    (r"\bcompression_value\.", "compress_v."),
    (r"\bact_layers\.0\.conv\.", "pointwise.conv."),
    (r"\bact_layers\.0\.", "norm_in."),
    (r"\bout_layers\.0\.", "conv_in."),
    (r"\bout_layers\.1\.", "norm_out."),
    (r"\bout_layers\.3\.", "conv_out."),
]
