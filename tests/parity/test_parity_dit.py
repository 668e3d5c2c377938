"""The transformers, their attention and the sampler against tensors from the official code."""

import pytest
import torch

from d3ds2.geometry.attention_plan import attention_plan
from d3ds2.geometry.voxels import Voxels, absolute_position_embedding
from d3ds2.kernels.block_scores import block_scores, select_blocks
from d3ds2.kernels.packed_attention import packed_attention, packed_attention_with_lse
from d3ds2.kernels.selection_attention import selection_attention
from d3ds2.kernels.spatial_sparse_attention import attend_windows
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention
from d3ds2.layers.transformer import TimestepEmbedder, time_frequencies
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.official.weights import latent_dit_state_dict, ssa_state_dict, structure_dit_state_dict
from d3ds2.rectified_flow import euler_sample, guided_velocity, half_precision_time, time_schedule
from tests.support.golden import Golden, assert_close, beside, golden, over, released_shapes

TOLERANCE = 1e-4  # largest error over rms, as the parity README suggests
GRADIENT_TOLERANCE = 3e-4


def voxels_of(coords, resolution=None):
    resolution = -(-(int(coords[:, 1:].max()) + 1) // 8) * 8 if resolution is None else resolution
    voxels, order = Voxels.sort(coords, resolution)
    assert order.equal(torch.arange(len(coords))), "the official order of tokens differs from ours"
    return voxels


def context_of(data: Golden) -> ImageTokens:
    """Return the condition of a parity file, packed with coordinates or dense (B, L, C), as image tokens."""
    cond = data.inputs["cond"]
    if cond.ndim == 2:
        coords = data.inputs["cond_coords"]
        return ImageTokens(cond, coords, torch.ones(len(cond), dtype=torch.bool), int(coords[:, 0].max()) + 1)
    return dense_tokens(cond)


def dense_tokens(features, foreground=None):
    """Return features (B, 5 + P², C) as image tokens; without `foreground`, any number per image (B, L, C)."""
    B, L, _ = features.shape
    coords = torch.zeros(B, L, 4, dtype=torch.int32)
    coords[..., 0] = torch.arange(B)[:, None]
    coords[:, :5, 3] = 1
    if foreground is None:
        foreground = torch.ones(B, L, dtype=torch.bool)
    else:
        P = foreground.shape[-1]
        rows, columns = torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij")
        coords[:, 5:, 1], coords[:, 5:, 2] = columns.flatten(), rows.flatten()
        foreground = torch.cat([torch.ones(B, 5, dtype=torch.bool), foreground.bool().flatten(1)], dim=1)
    return ImageTokens(features.flatten(0, 1), coords.flatten(0, 1), foreground.flatten(), B)


def latent_dit(config, params):
    sizes = {
        "latent_channels": config["in_channels"],
        "hidden_size": config["model_channels"],
        "depth": config["num_blocks"],
        "num_heads": config["num_heads"],
        "num_kv_heads": config["num_kv_heads"],
        "context_size": config["cond_channels"],
        "compression_block": config["compression_block_size"],
        "pooled_conv": config["compression_version"] == "v2",
        "top_k": config["topk"],
        "sparse_context": config["sparse_conditions"],
        "position_factor": config["factor"],
    }
    model = LatentDiT(LatentDiTConfig(**sizes))
    model.load_state_dict(latent_dit_state_dict(params))
    return model.requires_grad_(False)


def structure_dit(config, params):
    sizes = {
        "resolution": config["resolution"],
        "latent_channels": config["in_channels"],
        "hidden_size": config["model_channels"],
        "depth": config["num_blocks"],
        "num_heads": config["num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "context_size": config["cond_channels"],
        "qk_rms_norm": config["qk_rms_norm"],
    }
    model = StructureDiT(StructureDiTConfig(**sizes))
    model.load_state_dict(structure_dit_state_dict(params))
    return model.requires_grad_(False)


def record(module, results, name):
    module.register_forward_hook(lambda _module, _args, out: results.__setitem__(name, out.flatten(0, -2)))


@over("embedders*")
def test_embedders(name):
    data = golden(name)
    for key, expected in data.outputs.items():
        if key.startswith("ape_"):
            channels, factor = key.removeprefix("ape_c").split("_f")
            positions = data.inputs["xyz"] * (1.0 if factor == "None" else float(factor))
            assert_close(absolute_position_embedding(positions, int(channels)), expected, TOLERANCE, key)
    t = data.inputs["t"].double() / 1000
    assert_close(time_frequencies(t), data.outputs["t_freq"], TOLERANCE, "t_freq")
    embedder = TimestepEmbedder(data.config["timestep_hidden"])
    embedder.load_state_dict(data.params)
    assert_close(embedder(t), data.outputs["t_emb"], TOLERANCE, "t_emb")


@over("sort_extract*")
def test_sort_and_extract(name):
    data = golden(name)
    expected = {"latent_index": "sorted_8", "latent_index_b2": "sorted_b2_8"}
    assert "latent_index_b2" in data.inputs
    for key in expected.keys() & data.inputs.keys():
        coords, official = data.inputs[key], data.outputs[expected[key]]
        resolution = int(coords[:, 1:].max()) + 1
        voxels, order = Voxels.sort(coords, resolution)
        by_sample = official[official[:, 0].argsort(stable=True)]  # the official sort interleaves the samples
        assert coords[order].equal(voxels.coords.to(coords.dtype))
        blocks = torch.cat([voxels.coords[:, :1], voxels.coords[:, 1:] // 8], dim=1)
        # the official sort divides its result in place, so a file may hold the blocks of the sorted tokens
        assert by_sample.int().equal(voxels.coords) or by_sample.int().equal(blocks), key
    tokens = dense_tokens(data.inputs["tokens"], data.inputs["mask"]).select_foreground()
    assert tokens.features.equal(data.outputs["tokens_sel"])
    assert tokens.coords.equal(data.outputs["coords"].int())


@over("latent_index_*")
def test_order_of_a_real_structure(name):
    tensors = golden(name)
    (coords,) = (tensors.inputs | tensors.outputs).values()
    voxels_of(torch.nn.functional.pad(coords[:, -3:].int(), (1, 0)))


@over("window_attention*")
def test_window_attention(name):
    data = golden(name)
    voxels = voxels_of(data.inputs["coords"])
    for shift in data.config["shifts"]:
        windows = voxels.windows(shift, data.config["window_size"])
        leaves = [data.inputs[key].clone().requires_grad_() for key in "qkv"]
        q, k, v = leaves if windows.order is None else (x[windows.order] for x in leaves)
        out = packed_attention(q, k, v, windows.cu_seqlens, windows.cu_seqlens, windows.lengths, windows.lengths)
        out = out if windows.order is None else out[windows.inverse]
        assert_close(out, data.outputs[f"shift{shift}_out"], TOLERANCE, f"shift {shift}")
        grads = torch.autograd.grad((out * data.inputs["w"]).sum(), leaves)
        for key, grad in zip("qkv", grads, strict=True):
            assert_close(grad, data.outputs[f"shift{shift}_grad_{key}"], GRADIENT_TOLERANCE, f"grad {key}")


@over("block_score_*")
def test_block_scores(name):
    data = golden(name)
    voxels = voxels_of(data.inputs["coords"], data.config["resolution"])
    coarse, parent = voxels.coarsen(data.config["kernel_stride"])
    official = Voxels.sort(data.inputs["compressed_coords"], coarse.resolution)
    assert official[0].coords.equal(coarse.coords)
    keys, lse = data.inputs["compressed_k"][official[1]], data.inputs["lse"].t()
    block_of_compressed = torch.zeros(len(coarse), dtype=torch.long).scatter(0, parent, voxels.block_of_token)
    block_indices = select_blocks(
        data.inputs["q"], keys, lse, block_of_compressed, voxels.counts, coarse.counts, voxels.block_counts,
        data.config["topk"],
    )  # fmt: skip
    assert_blocks(block_indices, data.outputs["block_topk"], voxels)
    assert voxels.block_cu_seqlens.equal(data.outputs["cu_seqblocks"])
    assert voxels.block_offsets.equal(data.outputs["cu_block_include_tokens"])

    T, Tc = voxels.counts[0], coarse.counts[0]  # the first sample; scores per compressed token
    scale = data.config["head_dim"] ** -0.5
    scores = block_scores(data.inputs["q"][:T], data.inputs["compressed_k"][:Tc], lse[:T], torch.arange(Tc), Tc, scale)
    assert_close(scores.transpose(0, 1), data.inter["score"][:, :T, :Tc], TOLERANCE, "scores")


def assert_blocks(block_indices, official, voxels):
    """Compare our blocks (N, Hk, K), numbered over the batch, with official ones (Hk, N, K), numbered in the sample."""
    first = voxels.block_cu_seqlens[voxels.batch_index][:, None, None]
    ranks = torch.where(block_indices < 0, -1, block_indices - first)
    assert ranks.movedim(1, 0).equal(official.int())


def spatial_sparse_attention(config):
    return SpatialSparseAttention(
        config["hidden_size"], config["num_q_heads"], config["num_kv_heads"], config["compression_block_size"],
        config["compression_version"] == "v2", config["topk"], config["window_size"], config["shift_window"],
        config["head_dim"],
    )  # fmt: skip


@over("ssa_v1*", holding="outputs/out")
def test_spatial_sparse_attention(name, monkeypatch):
    data, grads = golden(name), golden(beside(name, "_grads")).grads
    config, module = data.config, spatial_sparse_attention(data.config)
    voxels = voxels_of(data.inputs["coords"], config["resolution"])
    chosen = []

    def recording_select_blocks(*arguments):
        chosen.append(select_blocks(*arguments))
        return chosen[-1]

    monkeypatch.setattr("d3ds2.kernels.spatial_sparse_attention.select_blocks", recording_select_blocks)
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in data.params.items()}
    x = data.inputs["x"].clone().requires_grad_()
    out = torch.func.functional_call(module, ssa_state_dict(leaves), (x, voxels))
    assert_close(out, data.outputs["out"], data.tolerance("outputs/out", TOLERANCE), "out")
    assert_blocks(chosen[0], data.outputs["block_topk"], voxels)

    names, tensors = ["x", *leaves], [x, *leaves.values()]
    ours = dict(zip(names, torch.autograd.grad((out * data.inputs["w"]).sum(), tensors), strict=True))
    for key, expected in grads.items():
        key, _, part = key.partition("#")
        grad = ours[key]
        if part == "sumsq":
            grad = grad.double().square().sum().reshape(1)
        elif part:
            grad = grad[[int(row) for row in part.split(",")]]
        assert_close(grad, expected, GRADIENT_TOLERANCE, f"{key}#{part}")


@over("ssa_v1*", holding="outputs/out_window")
def test_branches_of_spatial_sparse_attention(name):
    data = golden(name)
    config, outputs, module = data.config, data.outputs, spatial_sparse_attention(data.config)
    module.load_state_dict(ssa_state_dict(data.params))
    voxels = voxels_of(data.inputs["coords"], config["resolution"])
    coarse = voxels.coarsen(config["compression_block_size"])[0]
    order = Voxels.sort(outputs["compressed_coords"], coarse.resolution)[1]
    x = data.inputs["x"]
    q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
    compressed_k, compressed_v = module.compress(k, v, voxels)
    assert_close(compressed_k, outputs["compressed_k"][order], TOLERANCE, "compressed_k")
    assert_close(compressed_v, outputs["compressed_v"][order], TOLERANCE, "compressed_v")

    q, k, v = (projected.unflatten(-1, (-1, config["head_dim"])) for projected in (q, k, v))
    out, lse = packed_attention_with_lse(
        q, compressed_k, compressed_v, voxels.cu_seqlens, coarse.cu_seqlens, voxels.counts, coarse.counts
    )
    assert_close(out, outputs["out_compression"], TOLERANCE, "out_compression")
    assert_close(lse.t(), outputs["lse"], TOLERANCE, "lse")

    first = voxels.block_cu_seqlens[voxels.batch_index][:, None, None]
    ranks = outputs["block_topk"].movedim(0, 1).int()
    block_indices = torch.where(ranks < 0, -1, ranks + first)
    out = selection_attention(q, k, v, voxels.block_offsets, block_indices)
    assert_close(out, outputs["out_selection"], TOLERANCE, "out_selection")
    window = attend_windows(q, k, v, attention_plan(voxels, 8, module.window, module.shift).windows)
    assert_close(window, outputs["out_window"], TOLERANCE, "out_window")
    assert_close(module.gate(x).sigmoid(), outputs["gate"], TOLERANCE, "gate")


@over("sparse_dit_*")
def test_latent_dit(name, monkeypatch):
    data = golden(name)
    model = latent_dit(data.config, data.params)
    voxels, context = voxels_of(data.inputs["coords"], data.config["resolution"]), context_of(data)
    t = data.inputs["t"].double() / 1000
    results, chosen = {}, []
    record(model.time_embedder, results, "t_emb")
    record(model.context_layer, results, "cond")
    for i, block in enumerate(model.blocks):
        record(block, results, f"block{i}")
        record(block.self_attention, results, f"block{i}_self_attn")
        record(block.cross_attention, results, f"block{i}_cross_attn")
        record(block.feed_forward, results, f"block{i}_mlp")

    def recording_select_blocks(*arguments):
        chosen.append(select_blocks(*arguments))
        return chosen[-1]

    monkeypatch.setattr("d3ds2.kernels.spatial_sparse_attention.select_blocks", recording_select_blocks)
    out = model(data.inputs["x"], t, voxels, context)
    assert_close(out, data.outputs["out"], data.tolerance("outputs/out", TOLERANCE), "out")
    for i, block_indices in enumerate(chosen):
        assert_blocks(block_indices, data.outputs[f"block_topk{i}"], voxels)
    for key, expected in data.inter.items():
        key, _, every = key.partition("_every_")
        if key in results and key != "cond":
            assert_close(results[key][:: int(every or 1)], expected, TOLERANCE, key)
    if "out_uncond" in data.outputs:
        out = model(data.inputs["x"], t, voxels, context.zeroed())
        assert_close(out, data.outputs["out_uncond"], data.tolerance("outputs/out_uncond", TOLERANCE), "out_uncond")


@over("dense_dit*")
def test_structure_dit(name):
    data = golden(name)
    model, results = structure_dit(data.config, data.params), {}
    record(model.time_embedder, results, "t_emb")
    for i, block in enumerate(model.blocks):
        record(block, results, f"block{i}")
        record(block.self_attention, results, f"block{i}_self_attn")
        record(block.cross_attention, results, f"block{i}_cross_attn")
    out = model(data.inputs["x"], data.inputs["t"].double() / 1000, context_of(data))
    assert_close(out, data.outputs["out"], data.tolerance("outputs/out", TOLERANCE), "out")
    assert_close(model.position, data.params["pos_emb"], TOLERANCE, "pos_emb")
    for key, expected in data.inter.items():
        if key in results:
            assert_close(results[key], expected.flatten(0, -2), TOLERANCE, key)


@over("scheduler*")
def test_scheduler(name):
    data = golden(name)
    for shift in data.config["shift"]:
        for steps in data.config["steps"]:
            times = time_schedule(steps, shift)
            prefix = f"shift{shift:g}_n{steps}_"
            torch.testing.assert_close(times.float(), data.outputs[prefix + "sigmas"], atol=1e-6, rtol=0)
            rounded = torch.tensor([1000 * half_precision_time(t) for t in times[:-1].tolist()])
            expected = data.outputs[prefix + "timesteps_fp16"]
            assert (rounded - expected).abs().max() <= 0.51  # half a float16 step: sigmas differ in the last fp32 bit
            assert (rounded == expected).float().mean() > 0.9

    times, velocities = time_schedule(len(data.inputs["v"]), data.config["shift"][0]), iter(data.inputs["v"])
    states = []
    euler_sample(lambda _x, _t: next(velocities), data.inputs["x0"], times, lambda _step, x, _x_0: states.append(x))
    assert_close(torch.stack(states), data.outputs["steps"], TOLERANCE, "steps")


@over("sampler_*")
def test_sampler(name):
    data = golden(name)
    config, dit, noise = data.config, data.config["dit"], data.inputs["noise"]
    if config["mode"] == "dense":
        model, voxels = structure_dit(dit, data.params), None
        context = dense_tokens(data.inputs["tokens"])
    else:
        model = latent_dit(dit, data.params)
        voxels = Voxels.sort(data.inputs["latent_index"], dit["resolution"])[0]
        context = dense_tokens(data.inputs["tokens"], data.inputs.get("mask")).select_foreground()
    times = time_schedule(config["num_inference_steps"], config["shift"])
    velocity = guided_velocity(model, context, config["guidance_scale"], voxels)
    states = [noise]
    euler_sample(velocity, noise, times, lambda _step, x, _x_0: states.append(x))
    for step, state in enumerate(states[1:]):
        assert_close(velocity(states[step], times[step].item()), data.outputs[f"velocity{step}"], TOLERANCE, "velocity")
        assert_close(state, data.outputs[f"latents{step + 1}"], TOLERANCE, f"latents after step {step}")
    decoder_input = states[-1] / config["latents_scale"] + config["latents_shift"]
    assert_close(decoder_input, data.outputs["decoder_input"], TOLERANCE, "decoder_input")


V1_1 = {"compression_block": 8, "pooled_conv": False, "sparse_context": False}


@pytest.mark.parametrize(
    ("version", "file", "make", "translate"),
    [
        ("v1.0", "model_dense.ckpt", lambda: StructureDiT(StructureDiTConfig()), structure_dit_state_dict),
        ("v1.0", "model_sparse_512.ckpt", lambda: LatentDiT(LatentDiTConfig(top_k=32)), latent_dit_state_dict),
        ("v1.0", "model_sparse_1024.ckpt", lambda: LatentDiT(LatentDiTConfig()), latent_dit_state_dict),
        ("v1.1", "model_sparse_512.ckpt", lambda: LatentDiT(LatentDiTConfig(**V1_1)), latent_dit_state_dict),
        ("v1.1", "model_sparse_1024.ckpt", lambda: LatentDiT(LatentDiTConfig(**V1_1)), latent_dit_state_dict),
    ],
)
def test_released_configurations_hold_the_released_weights(version, file, make, translate):
    with torch.device("meta"):
        model = make()
        official = {key: torch.empty(shape) for key, shape in released_shapes(version, file, "dit").items()}
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in translate(official).items()} == expected
