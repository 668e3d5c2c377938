"""Write a tiny release of Direct3D-S2: config.yaml, five .ckpt files under their official names, torch.hub's DINOv2.

Its weights are random, and it makes a mesh in seconds.
"""

import re
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from d3ds2.official.weights import NAMINGS
from tests.support.golden import released_shapes

C, DEPTH = 64, 2  # hidden size and depth of the transformers
RESOLUTION = 2  # edge of the structure transformer's grid
VAE_DEPTH, WIDTHS = 1, (4, 8)  # depth of the SDF autoencoders, widths of the refiners
COMPRESSION = {"v1.0": (True, 4), "v1.1": (False, 8)}  # whether pooled_conv and sparse_context; compression block
PACKAGE = "direct3d_s2."


def make_modules(version: str, seed: int = 0) -> dict[str, dict[str, nn.Module]]:
    """Return our networks, `modules[file][part]`."""
    torch.manual_seed(seed)
    latent_resolution = 4 * RESOLUTION
    modules = {
        "model_dense.ckpt": {
            "vae": StructureVAE(StructureVAEConfig(4, (8, 16, 16), (16, 16, 8), 1, 1, 1, 1)),
            "dit": StructureDiT(StructureDiTConfig(RESOLUTION, 4, C, DEPTH, 2, context_size=C)),
        }
    }
    for size, factor, resolution in ((512, 1.0, latent_resolution), (1024, 0.5, 2 * latent_resolution)):
        modules[f"model_sparse_{size}.ckpt"] = {
            "vae": SDFVAE(SDFVAEConfig(16, C, 2, VAE_DEPTH, VAE_DEPTH, 8, 4, 8 * resolution)),
            "dit": LatentDiT(_latent_dit_config(version, factor)),
        }
    sizes = {"widths": WIDTHS, "layers": 1, "middle_layers": 0}
    refiner = Refiner(RefinerConfig(**sizes, patch_size=24, feature_channels=C // 16))
    modules["model_refiner.ckpt"] = {"refiner": refiner}
    modules["model_refiner_1024.ckpt"] = {"refiner": SignRefiner(SignRefinerConfig(**sizes, patch_size=32))}
    for parts in modules.values():
        for part, module in parts.items():
            module.eval().requires_grad_(False)
            if part == "dit":  # a new transformer returns zero
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    modules["model_dense.ckpt"]["vae"].decoder.out_conv.bias.fill_(-2.6)  # so that some voxels are occupied
    return modules


def _latent_dit_config(version: str, factor: float) -> LatentDiTConfig:
    pooled_conv, block = COMPRESSION[version]
    return LatentDiTConfig(
        16, C, DEPTH, 4, 2, 4.0, C, block, pooled_conv, 8, 4, 8, sparse_context=pooled_conv, position_factor=factor
    )


def without_numbers(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def official_state(module: nn.Module, version: str, file: str, part: str) -> dict[str, Tensor]:
    """Return a module's state dict with the names and layouts of the official one; every name is in the release."""
    network = {
        StructureVAE: "structure_vae",
        StructureDiT: "structure_dit",
        SDFVAE: "sdf_vae",
        LatentDiT: "latent_dit",
        Refiner: "refiner",
        SignRefiner: "refiner",
    }[type(module)]
    known, state = {without_numbers(key) for key in released_shapes(version, file, part)}, {}
    for name, tensor in module.state_dict().items():
        key = NAMINGS[network].official(name)
        assert without_numbers(key) in known, key
        if key.endswith(".kernel"):
            is_pointwise = tensor.ndim == 2
            tensor = tensor.t() if is_pointwise else tensor.unflatten(0, (3, 3, 3)).permute(2, 1, 0, 3, 4).flatten(0, 2)
        if key.endswith("intra_block_pe"):
            block = round(len(tensor) ** (1 / 3))
            tensor = tensor.unflatten(0, (block, block, block))
        state[key] = tensor.clone().contiguous()
    if network == "structure_dit":
        state["pos_emb"] = module.position.clone()
    return state


def official_config(version: str) -> dict:
    """Return the config.yaml for the networks of `make_modules`, with the keys of the released one."""
    pooled_conv, block = COMPRESSION[version]
    resolution = 4 * RESOLUTION

    def entry(target: str, **params) -> dict:
        return {"target": PACKAGE + target, "params": params}

    def sparse_vae(resolution: int, chunk_size: int) -> dict:
        sizes = {}
        for side in ("encoder", "decoder"):
            sizes |= {f"model_channels_{side}": C, f"num_blocks_{side}": VAE_DEPTH, f"num_heads_{side}": 2}
        scale = {"latents_scale": 1.0, "latents_shift": 0.0}
        return entry(
            "models.autoencoders.ss_vae.SparseSDFVAE",
            **sizes, **scale, embed_dim=16, resolution=resolution, out_channels=1, chunk_size=chunk_size, use_fp16=True,
        )  # fmt: skip

    def sparse_dit(resolution: int, factor: float) -> dict:
        return entry(
            "models.transformers.sparse_dit.SparseDiT",
            resolution=resolution, in_channels=16, out_channels=16, model_channels=C, cond_channels=C,
            num_blocks=DEPTH, num_heads=4, num_kv_heads=2, compression_block_size=block, selection_block_size=8,
            topk=4, compression_version="v2" if pooled_conv else "v1", factor=factor, sparse_conditions=pooled_conv,
            pe_mode="ape", qk_rms_norm=True, use_shift=True, use_fp16=True, use_checkpoint=True,
        )  # fmt: skip

    def scheduler(shift: float) -> dict:
        return entry("utils.rectified_flow.Scheduler", num_train_timesteps=1000, shift=shift)

    def refiner(name: str, patch_size: int) -> dict:
        sizes = {"in_channels": 1, "out_channels": 1, "layers_per_block": 1, "layers_mid_block": 0}
        return entry(f"models.refiner.unet_refiner.{name}", **sizes, patch_size=patch_size, use_fp16=True)

    return {
        "dense_vae": entry(
            "models.autoencoders.dense_vae.DenseShapeVAE",
            embed_dim=4, in_channels=1, out_channels=1, model_channels_encoder=[8, 16, 16],
            model_channels_decoder=[16, 16, 8], num_res_blocks_encoder=1, num_res_blocks_middle_encoder=1,
            num_res_blocks_decoder=1, num_res_blocks_middle_decoder=1, latents_scale=1.0, latents_shift=0.0,
        ),
        "dense_dit": entry(
            "models.transformers.dense_dit.DenseDiT",
            resolution=RESOLUTION, in_channels=4, out_channels=4, model_channels=C, cond_channels=C,
            num_blocks=DEPTH, num_heads=2, mlp_ratio=4, patch_size=1, pe_mode="ape", qk_rms_norm=True,
            latent_shape=[4, RESOLUTION, RESOLUTION, RESOLUTION],
        ),
        "sparse_vae_512": sparse_vae(resolution, 1),
        "sparse_dit_512": sparse_dit(resolution, 1.0),
        "sparse_vae_1024": sparse_vae(2 * resolution, 4),
        "sparse_dit_1024": sparse_dit(2 * resolution, 0.5),
        "refiner": refiner("Voxel_RefinerXL", 24),
        "refiner_1024": refiner("Voxel_RefinerXL_sign", 32),
        "dense_image_encoder": entry("models.conditioner.DinoEncoder", model="dinov2_vitl14_reg", size=518),
        "dense_scheduler": scheduler(6.0),
        "sparse_scheduler_512": scheduler(6.0),
        "sparse_scheduler_1024": scheduler(8.0),
    }  # fmt: skip


def hub_state(hidden_size: int = C, depth: int = 2, patches: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights for DINOv2 with registers, under torch.hub's names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    D = hidden_size
    state = {
        "cls_token": random(1, 1, D), "pos_embed": random(1, 1 + patches**2, D), "register_tokens": random(1, 4, D),
        "mask_token": random(1, D), "patch_embed.proj.weight": random(D, 3, 14, 14), "patch_embed.proj.bias": random(D),
    }  # fmt: skip
    for i in range(depth):
        block = {
            "norm1.weight": 1 + random(D), "norm1.bias": random(D), "attn.qkv.weight": random(3 * D, D),
            "attn.qkv.bias": random(3 * D), "attn.proj.weight": random(D, D), "attn.proj.bias": random(D),
            "ls1.gamma": random(D), "norm2.weight": 1 + random(D), "norm2.bias": random(D),
            "mlp.fc1.weight": random(4 * D, D), "mlp.fc1.bias": random(4 * D), "mlp.fc2.weight": random(D, 4 * D),
            "mlp.fc2.bias": random(D), "ls2.gamma": random(D),
        }  # fmt: skip
        state |= {f"blocks.{i}.{key}": tensor for key, tensor in block.items()}
    return state | {"norm.weight": 1 + random(D), "norm.bias": random(D)}


def write_release(folder: Path, version: str) -> dict[str, dict[str, nn.Module]]:
    """Write all files of a release; return its networks, as `make_modules` does."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = make_modules(version)
    for file, parts in modules.items():
        state = {part: official_state(module, version, file, part) for part, module in parts.items()}
        torch.save(state, folder / file)
    (folder / "config.yaml").write_text(yaml.safe_dump(official_config(version)))
    torch.save(hub_state(), folder / "dinov2_vitl14_reg4_pretrain.pth")
    return modules
