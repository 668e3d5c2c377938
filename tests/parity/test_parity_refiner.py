"""The refiners, on a patch and over a volume, against tensors from the official code."""

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.refined_blocks import refine_distances, refine_signs, signed_slab
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from d3ds2.official.weights import refiner_state_dict
from tests.support.golden import Golden, assert_close, golden, over, released_shapes

OUTPUT, TANH = 1e-4, 3e-4  # largest error over rms


def network(data: Golden) -> Refiner | SignRefiner:
    """Return the network of a parity file, with its weights."""
    widths = next(value for key, value in data.config.items() if "block_out_channels" in key)
    sizes = {
        "widths": tuple(widths),
        "layers": data.config["layers_per_block"],
        "middle_layers": data.config["layers_mid_block"],
        "patch_size": data.config["patch_size"],
    }
    if "Voxel_RefinerXL_sign" in data.meta["module"]:
        model = SignRefiner(SignRefinerConfig(**sizes))
    else:
        model = Refiner(RefinerConfig(**sizes, feature_channels=data.params["latent_mlp.net.0.weight"].shape[1]))
    model.load_state_dict(refiner_state_dict(data.params))
    return model.requires_grad_(False)


def record(model: Refiner | SignRefiner) -> dict[str, torch.Tensor]:
    """Return a dict that gets the outputs of a network's parts when it runs, under the names of the parity files."""
    results = {}
    parts = {f"unet_down{i}": blocks[-1] for i, blocks in enumerate(model.unet.down_blocks)}
    # a level that is halved ends with its downsampling
    parts |= {f"unet_down{i}": block for i, block in enumerate(model.unet.downsamples)}
    parts |= {"unet_mid": model.unet.middle_blocks[-1], "unet": model.unet, "conv_out": model.output_conv}
    parts |= {f"adaptive{i}": getattr(model, f"adaptive{i}") for i in (1, 2) if hasattr(model, f"adaptive{i}")}
    for name, part in parts.items():
        part.register_forward_hook(lambda _m, _a, out, name=name: results.__setitem__(name, out.clone()))
    return results


def compare(results: dict[str, torch.Tensor], data: Golden) -> None:
    known = data.inter.keys() & results.keys()
    assert known >= {"unet_down3", "unet_mid", "conv_out"} & data.inter.keys()
    for name in known:
        assert_close(results[name], data.inter[name], data.tolerance(f"inter/{name}", OUTPUT), name)


@over("refiner_xl*", holding="outputs/out")
def test_refiner(name):
    data = golden(name)
    model = network(data)
    results = record(model)
    P = data.inputs["sdf"].shape[-1]
    features = torch.zeros(P**3, data.inputs["feat_values"].shape[1])
    x, y, z = data.inputs["feat_index"].long().unbind(1)
    features[(x * P + y) * P + z] = data.inputs["feat_values"]
    embedded = model.embed_features(features).t().reshape(1, -1, P, P, P)
    if "latent_mlp" in data.inter:
        assert_close(embedded, data.inter["latent_mlp"], OUTPUT, "latent_mlp")
    out = model(data.inputs["sdf"], embedded)
    compare(results, data)
    assert_close(out, data.outputs["out"], data.tolerance("outputs/out", TANH), "out")


@over("refiner_sign*", holding="outputs/out")
def test_sign_refiner(name):
    data = golden(name)
    model = network(data)
    results = record(model)
    logits = model(data.inputs["sdf"])
    compare(results, data)
    assert torch.equal(torch.where(logits >= 0, 1.0, -1.0), data.outputs["out"])


def decoded(data: Golden, resolution: int) -> tuple[Voxels, torch.Tensor, torch.Tensor]:
    voxels, order = Voxels.sort(data.inputs["coords"], resolution)
    return voxels, data.inputs["sdf"][order], order


@over("refiner_xl*", holding="outputs/volume")
def test_refined_volume(name):
    data = golden(name)
    expected = data.outputs["volume"]
    voxels, sdf, order = decoded(data, len(expected))
    assert_close(refine_distances(network(data), sdf, data.inputs["feat"][order], voxels), expected, TANH)


@over("refiner_sign*", holding="outputs/volume")
def test_signed_volume(name):
    data = golden(name)
    expected = data.outputs["volume"]
    R = len(expected)
    voxels, sdf, _ = decoded(data, R)
    outside = refine_signs(network(data), sdf, voxels)
    slabs = [signed_slab(sdf, voxels, outside, first, min(first + 7, R)) for first in range(0, R, 7)]
    assert torch.equal(torch.cat(slabs), expected)


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("model_refiner.ckpt", lambda: Refiner(RefinerConfig())),
        ("model_refiner_1024.ckpt", lambda: SignRefiner(SignRefinerConfig())),
    ],
)
def test_default_sizes_hold_the_released_weights(file, make):
    with torch.device("meta"):
        model = make()
        official = {key: torch.empty(shape) for key, shape in released_shapes("v1.0", file, "refiner").items()}
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in refiner_state_dict(official).items()} == expected


@pytest.mark.gpu
@over("refiner_xl*", holding="outputs/out")
def test_refiner_on_a_gpu(name):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    data = golden(name)
    model, sdf = network(data).cuda(), data.inputs["sdf"].cuda()
    P = sdf.shape[-1]
    features = torch.zeros(P**3, data.inputs["feat_values"].shape[1])
    x, y, z = data.inputs["feat_index"].long().unbind(1)
    features[(x * P + y) * P + z] = data.inputs["feat_values"]
    out = model(sdf, model.embed_features(features.cuda()).t().reshape(1, -1, P, P, P))
    assert_close(out.cpu(), data.outputs["out"], data.tolerance("outputs/out", TANH), "out")
