"""Write a second parity collection: the official file format with other sizes and seeds, made by our own modules.

These files prove nothing about the official code. They show that the parity tests take sizes, seeds, names and
parameters from the files alone, so the tests accept any collection.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.refined_blocks import refine_distances, refine_signs, signed_slab
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from d3ds2.rectified_flow import euler_sample, guided_velocity, time_schedule
from tests.parity import test_parity_dit as dit
from tests.parity import test_parity_vae as vae
from tests.parity.test_parity_refiner import network
from tests.support.golden import recipe_parameters
from tests.support.official_release import official_state
from tests.support.random_voxels import random_coords

BLOCK_NAME = "block_out_channels"


def official_parameters(module: nn.Module, file: str, part: str, meta: dict, version: str = "v1.0") -> dict:
    """Return parameters for a module by their official names, made by a recipe; write the recipe into `meta`."""
    recipe = {}
    for key, tensor in official_state(module, version, file, part).items():
        if key == "pos_emb":
            continue
        is_norm = tensor.ndim == 1 and key.endswith("weight")
        fan_in = tensor[..., 0].numel() if key.endswith("kernel") else tensor[0].numel()
        bound = 0.2 if tensor.ndim == 1 else (2 / max(fan_in, 1)) ** 0.5
        recipe[key] = {"shape": [*tensor.shape], "bound": bound, "offset": 1.0 if is_norm else 0.0}
    meta["param_recipe"] = recipe
    return recipe_parameters(meta)


def write(folder: Path, meta: dict, params: dict, store: bool = True, **kinds: dict[str, Tensor]) -> None:
    """Write a parity file and its sidecar `meta`; without `store`, the parameters are left to the recipe in `meta`."""
    if not store:
        meta["param_sum_f64"] = sum(p.double().sum().item() for p in params.values())
        meta["param_abs_sum_f64"] = sum(p.double().abs().sum().item() for p in params.values())
    tensors = {f"params/{key}": p.half() if "pos_emb" not in key else p for key, p in params.items()} if store else {}
    for kind, values in kinds.items():
        tensors |= {f"{kind}/{key}": value.detach().clone().contiguous() for key, value in values.items()}
    save_file(tensors, folder / f"{meta['name']}.safetensors")
    (folder / f"{meta['name']}.json").write_text(json.dumps(meta))


def sorted_coords(counts: list[int], resolution: int) -> Tensor:
    """Return the coords (N, 4) of random voxels, `counts[b]` of them in sample b, in the order of `Voxels`."""
    return Voxels.sort(random_coords(counts, resolution), resolution)[0].coords


class SelectedBlocks(list):
    """Record the blocks that each call of attention selects: (Hk, N, K), numbered within the sample."""

    def __init__(self, voxels: Voxels):
        from d3ds2.kernels import spatial_sparse_attention as module

        self.voxels, self.module, self.select = voxels, module, module.select_blocks

    def __enter__(self) -> "SelectedBlocks":
        def select(*arguments):
            found = self.select(*arguments)
            first = self.voxels.block_cu_seqlens[self.voxels.batch_index][:, None, None]
            self.append(torch.where(found < 0, -1, found - first).movedim(1, 0).to(torch.int16))
            return found

        self.module.select_blocks = select
        return self

    def __exit__(self, *_error) -> None:
        self.module.select_blocks = self.select


SPARSE = {  # entries of the sidecar, by version
    "v10": {"compression_block_size": 4, "compression_version": "v2", "sparse_conditions": True},
    "v11": {"compression_block_size": 8, "compression_version": "v1", "sparse_conditions": False},
}


def latent_dit(meta: dict, config: dict, version: str) -> tuple[LatentDiT, dict]:
    """Return a latent DiT, and its parameters by their official names; write their recipe into `meta`."""
    pooled = config["compression_version"] == "v2"
    made = LatentDiT(
        LatentDiTConfig(
            config["in_channels"], config["model_channels"], config["num_blocks"], config["num_heads"],
            config["num_kv_heads"], context_size=config["cond_channels"], pooled_conv=pooled,
            compression_block=config["compression_block_size"], sparse_context=config["sparse_conditions"],
        )
    )  # fmt: skip
    release = {"v10": "v1.0", "v11": "v1.1"}[version]
    params = official_parameters(made, "model_sparse_512.ckpt", "dit", meta, release)
    return dit.latent_dit(config, params), params


def write_sparse_dit(folder: Path, version: str, store: bool) -> None:
    config = SPARSE[version] | {
        "in_channels": 12, "out_channels": 12, "model_channels": 96, "cond_channels": 40, "num_blocks": 3,
        "num_heads": 6, "num_kv_heads": 3, "topk": 2, "resolution": 40, "factor": 0.5, "selection_block_size": 8,
    }  # fmt: skip
    meta = {"name": f"sparse_dit_{version}{'' if store else '_wide'}_b", "config": config, "seed": 77001}
    model, params = latent_dit(meta, config, version)
    voxels = Voxels.sort(sorted_coords([230, 301, 77], 40), 40)[0]
    inputs = {"x": torch.randn(len(voxels), 12), "coords": voxels.coords, "t": torch.tensor([900.0, 333.0, 12.0])}
    if config["sparse_conditions"]:
        cond_coords = torch.randint(0, 9, (50, 4), dtype=torch.int32)
        cond_coords[:, 0] = (torch.arange(50) // 17).clamp(max=2)
        inputs |= {"cond": torch.randn(50, 40), "cond_coords": cond_coords}
    else:
        inputs["cond"] = torch.randn(3, 23, 40)
    context = dit.context_of(type("Data", (), {"inputs": inputs}))
    with SelectedBlocks(voxels) as selected, torch.no_grad():
        out = model(inputs["x"], inputs["t"].double() / 1000, voxels, context)
        blocks = {f"block_topk{i}": topk for i, topk in enumerate(selected)}
        outputs = {"out": out, "out_uncond": model(inputs["x"], inputs["t"].double() / 1000, voxels, context.zeroed())}
    write(folder, meta, params, store, inputs=inputs, outputs=outputs | blocks)


def write_ssa(folder: Path, version: str) -> None:
    config = SPARSE[version] | {
        "hidden_size": 48, "num_q_heads": 6, "num_kv_heads": 2, "head_dim": 24, "topk": 2, "window_size": 8,
        "shift_window": 0, "resolution": 40, "selection_block_size": 8,
    }  # fmt: skip
    meta = {"name": f"ssa_{version}_b", "config": config, "seed": 77002}
    small = LatentDiTConfig(
        4, 48, 1, 6, 2, context_size=8, compression_block=config["compression_block_size"],
        pooled_conv=config["compression_version"] == "v2", sparse_context=config["sparse_conditions"],
    )  # fmt: skip
    block = LatentDiT(small)
    block.blocks[0].self_attention = dit.spatial_sparse_attention(config)
    all_meta = {"seed": 77002}
    release = {"v10": "v1.0", "v11": "v1.1"}[version]
    official_parameters(block, "model_sparse_512.ckpt", "dit", all_meta, release)
    prefix = "blocks.0.self_attn."
    own = {key.removeprefix(prefix): e for key, e in all_meta["param_recipe"].items() if key.startswith(prefix)}
    meta["param_recipe"] = own
    params = recipe_parameters(meta)
    module = dit.spatial_sparse_attention(config)
    voxels = Voxels.sort(sorted_coords([250, 0, 190], 40), 40)[0]
    leaves = {key: p.clone().requires_grad_() for key, p in params.items()}
    x, w = torch.randn(len(voxels), 48).requires_grad_(), torch.randn(len(voxels), 48)
    with SelectedBlocks(voxels) as selected:
        out = torch.func.functional_call(module, dit.ssa_state_dict(leaves), (x, voxels))
    grads = torch.autograd.grad((out * w).sum(), [x, *leaves.values()])
    grads = dict(zip(["x", *leaves], grads, strict=True))
    inputs = {"x": x, "coords": voxels.coords, "w": w}
    write(folder, meta, params, inputs=inputs, outputs={"out": out, "block_topk": selected[0]})
    write(folder, {"name": f"ssa_{version}_grads_b", "config": config, "seed": 77002}, {}, grads=grads)


def write_dense_dit(folder: Path) -> None:
    config = {
        "resolution": 5, "in_channels": 6, "out_channels": 6, "model_channels": 72, "cond_channels": 30,
        "num_blocks": 1, "num_heads": 3, "mlp_ratio": 3, "qk_rms_norm": True,
    }  # fmt: skip
    meta = {"name": "dense_dit_b", "config": config, "seed": 77003}
    made = StructureDiT(StructureDiTConfig(5, 6, 72, 1, 3, 3.0, 30))
    params = official_parameters(made, "model_dense.ckpt", "dit", meta) | {"pos_emb": made.position}
    model = dit.structure_dit(config, params)
    inputs = {"x": torch.randn(3, 6, 5, 5, 5), "t": torch.tensor([5.0, 500.0, 999.0]), "cond": torch.randn(3, 11, 30)}
    out = model(inputs["x"], inputs["t"].double() / 1000, dit.dense_tokens(inputs["cond"]))
    write(folder, meta, params, inputs=inputs, outputs={"out": out})


def write_sampler(folder: Path) -> None:
    config = SPARSE["v10"] | {
        "in_channels": 6, "model_channels": 48, "cond_channels": 20, "num_blocks": 1, "num_heads": 4,
        "num_kv_heads": 2, "topk": 1, "resolution": 24, "factor": 1.0,
    }  # fmt: skip
    sampling = {"num_inference_steps": 3, "guidance_scale": 3.0, "shift": 4.0, "latents_scale": 0.5,
                "latents_shift": -0.25}  # fmt: skip
    meta = {"name": "sampler_sparse512_b", "config": sampling | {"mode": "sparse512", "dit": config}, "seed": 77004}
    model, params = latent_dit(meta, config, "v10")
    voxels = Voxels.sort(sorted_coords([111], 24), 24)[0]
    inputs = {"noise": torch.randn(len(voxels), 6), "tokens": torch.randn(1, 5 + 16, 20),
              "mask": torch.rand(1, 4, 4) < 0.5, "latent_index": voxels.coords.long()}  # fmt: skip
    context = dit.dense_tokens(inputs["tokens"], inputs["mask"]).select_foreground()
    times, outputs, states = time_schedule(3, 4.0), {}, [inputs["noise"]]
    velocity = guided_velocity(model, context, 3.0, voxels)
    euler_sample(velocity, inputs["noise"], times, lambda _step, x, _x_0: states.append(x))
    for step in range(3):
        outputs[f"velocity{step}"] = velocity(states[step], times[step].item())
        outputs[f"latents{step + 1}"] = states[step + 1]
    outputs["decoder_input"] = states[-1] / 0.5 - 0.25
    write(folder, meta, params, False, inputs=inputs, outputs=outputs)


def write_dense_vae(folder: Path) -> None:
    config = {
        "embed_dim": 3, "model_channels_encoder": [4, 12], "model_channels_decoder": [12, 4],
        "num_res_blocks_encoder": 2, "num_res_blocks_middle_encoder": 1, "num_res_blocks_decoder": 1,
        "num_res_blocks_middle_decoder": 2,
    }  # fmt: skip
    meta = {"name": "dense_vae_b", "config": config, "seed": 77005}
    made = StructureVAE(StructureVAEConfig(3, (4, 12), (12, 4), 2, 1, 1, 2))
    params = official_parameters(made, "model_dense.ckpt", "vae", meta)
    made.load_state_dict(vae.structure_vae_state_dict(params))
    inputs = {"occ": (torch.rand(3, 1, 12, 12, 12) < 0.2).to(torch.uint8), "z": torch.randn(3, 3, 6, 6, 6)}
    mean, logvar = made.encode(inputs["occ"])
    logits = made.decode(inputs["z"])
    outputs = {"mean": mean, "logvar": logvar, "logits": logits}
    outputs |= {f"index_item{i}": made.occupied(logits[i : i + 1]).coords for i in range(3)}
    write(folder, meta, params, inputs=inputs, outputs=outputs)


def write_sparse_vae(folder: Path) -> None:
    config = {"embed_dim": 6, "resolution": 6, vae.GROUPS: 3}
    for side in ("encoder", "decoder"):
        config |= {f"model_channels_{side}": 48, f"num_blocks_{side}": 1, f"num_heads_{side}": 6}
    meta = {"name": "sparse_vae_b", "config": config, "seed": 77006, "factor": 0.5}
    made = SDFVAE(SDFVAEConfig(6, 48, 6, 1, 1, group_norm_groups=3))
    params = official_parameters(made, "model_sparse_512.ckpt", "vae", meta)
    made.load_state_dict(vae.sdf_vae_state_dict(params))
    fine = Voxels.sort(random_coords([700, 900], 48), 48)[0]
    sdf, latent = torch.rand(len(fine), 1) * 2 - 1, Voxels.sort(random_coords([40, 60], 6), 6)[0]
    mean, logvar, index = made.encode(sdf, fine, 0.5)
    inputs = {"sparse_sdf": sdf[:, 0], "sparse_index": fine.coords[:, 1:].short(), "batch_idx": fine.coords[:, 0],
              "latents": torch.randn(len(latent), 6), "latent_coords": latent.coords}  # fmt: skip
    decoded, features, voxels = made.decode_with_features(inputs["latents"], latent, 0.5)
    nested = vae.nested_children(latent.coords.long())
    rows = vae.rows_of(voxels.coords, nested)
    outputs = {"mean": mean, "logvar": logvar, "latent_index": index.coords, "sdf": decoded[rows],
               "sdf_coords_every_64": nested[::64], "feat_every_16": features[rows[::16]]}  # fmt: skip
    write(folder, meta, params, inputs=inputs, outputs=outputs)
    chunked = {"coords_every_16": voxels.coords[::16], "sdf_every_16": decoded[::16]}
    meta = {"name": "sparse_vae_chunk_b", "config": config, "seed": 77006, "unique_rows": len(decoded)}
    write(folder, meta, {}, outputs=chunked)


def write_refiners(folder: Path) -> None:
    sizes = {"layers_per_block": 1, "layers_mid_block": 2, BLOCK_NAME: [4, 8, 12]}
    for kind, P in (("xl", 12), ("sign", 24)):
        config = sizes | {"patch_size": P, "res": 32}
        module = "Voxel_RefinerXL" + ("_sign" if kind == "sign" else "")
        meta = {"name": f"refiner_{kind}_b", "module": module, "config": config, "seed": 77007}
        given = ((4, 8, 12), 1, 2, P)
        if kind == "sign":
            made, file = SignRefiner(SignRefinerConfig(*given)), "model_refiner_1024.ckpt"
        else:
            made, file = Refiner(RefinerConfig(*given, 10)), "model_refiner.ckpt"
        params = official_parameters(made, file, "refiner", meta)
        model = network(type("Data", (), {"config": config, "meta": meta, "params": params}))
        inputs = {"sdf": torch.rand(1, 1, P, P, P) * 2 - 1}
        if kind == "sign":
            out = torch.where(model(inputs["sdf"]) >= 0, 1.0, -1.0)
        else:
            inputs["feat_index"] = (torch.rand(P, P, P) < 0.3).nonzero().to(torch.int8)
            inputs["feat_values"] = torch.randn(len(inputs["feat_index"]), 10)
            features = torch.zeros(P, P, P, 10)
            features[tuple(inputs["feat_index"].long().T)] = inputs["feat_values"]
            out = model(inputs["sdf"], model.embed_features(features).movedim(-1, 0)[None])
        write(folder, meta, params, inputs=inputs, outputs={"out": out})
        write_refined_volume(folder, meta, params, model, 32 if kind == "xl" else 96)


def write_refined_volume(folder: Path, meta: dict, params: dict, model: nn.Module, resolution: int) -> None:
    """Write the result over a whole volume, three patches per edge.

    The patches of the refiner cover 32 = 12 + 2 · 10 voxels, those of the sign refiner 96 / 2 = 24 + 2 · 12 cells.
    """
    meta = meta | {"name": meta["name"].replace("_b", "_run_b")}
    voxels = Voxels.sort(random_coords([2000], resolution), resolution)[0]
    inputs = {"sdf": torch.rand(2000, 1) * 2 - 1, "coords": voxels.coords.short()}
    if isinstance(model, SignRefiner):
        outside = refine_signs(model, inputs["sdf"], voxels)
        volume = signed_slab(inputs["sdf"], voxels, outside, 0, resolution)
    else:
        inputs["feat"] = torch.randn(2000, 10)
        volume = refine_distances(model, inputs["sdf"], inputs["feat"], voxels)
    write(folder, meta, params, inputs=inputs, outputs={"volume": volume})


def write_collection(folder: Path) -> None:
    """Write all kinds of parity files into `folder`."""
    torch.manual_seed(5)
    write_sparse_dit(folder, "v10", True)
    write_sparse_dit(folder, "v11", False)
    write_ssa(folder, "v10")
    write_ssa(folder, "v11")
    write_dense_dit(folder)
    write_sampler(folder)
    write_dense_vae(folder)
    write_sparse_vae(folder)
    write_refiners(folder)
