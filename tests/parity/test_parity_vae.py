"""Both autoencoders and their sparse layers against tensors from the official code; sidecars give the sizes."""

from functools import cache

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.layers.sparse_conv import PackedGroupNorm, SubmanifoldConv3d, mean_pool
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from d3ds2.official.weights import convolution, sdf_vae_state_dict, structure_vae_state_dict
from tests.support.golden import Golden, assert_close, golden, over, released_shapes

OUTPUT, GRADIENT, TANH = 1e-4, 3e-4, 3e-4  # largest error over rms
GROUPS = "num_groups of the encoder down blocks (official constant 32)"


def rows_of(coords: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the row in `coords` (N, 4) of each of the coords `wanted` (M, 4); all of them must be there."""
    size = int(max(coords.max(), wanted.max())) + 1
    scale = torch.tensor([size**3, size**2, size, 1])
    keys, order = (coords.long() * scale).sum(1).sort()
    found = torch.searchsorted(keys, (wanted.long() * scale).sum(1))
    assert torch.equal(coords[order[found]].long(), wanted.long())
    return order[found]


def assert_same_set(coords: torch.Tensor, wanted: torch.Tensor) -> None:
    assert len(coords) == len(wanted)
    rows_of(coords, wanted)


def sorted_voxels(coords: torch.Tensor, multiple: int = 8) -> tuple[Voxels, torch.Tensor]:
    edge = int(coords[:, 1:].max()) + 1
    return Voxels.sort(coords, -(-edge // multiple) * multiple)


# --- layers


@over("torchsparse_conv3d*")
def test_convolution(name):
    data = golden(name)
    voxels, order = sorted_voxels(data.inputs["coords"])
    official = {key: value for key, value in data.params.items() if key.startswith("k3.")}
    conv = SubmanifoldConv3d(data.config["in_channels"], data.config["out_channels"])
    conv.load_state_dict({k.removeprefix("k3."): v for k, v in (convolution(*item) for item in official.items())})

    feats = data.inputs["feats"].requires_grad_()
    out = conv(feats[order], voxels)
    (out * data.inputs["w"][order]).sum().backward()
    assert_close(out, data.outputs["out_k3"][order], OUTPUT, "out")
    assert_close(feats.grad, data.outputs["grad_feats"], GRADIENT, "grad_feats")
    assert_close(conv.bias.grad, data.outputs["grad_bias"], GRADIENT, "grad_bias")
    _, grad_weight = convolution("k3.conv.kernel", data.outputs["grad_kernel"])
    assert_close(conv.weight.grad, grad_weight, GRADIENT, "grad_kernel")


@over("torchsparse_conv3d*")
def test_pointwise_convolution_is_a_linear(name):
    data = golden(name)
    _, weight = convolution("k1.conv.kernel", data.params["k1.conv.kernel"])
    out = torch.nn.functional.linear(data.inputs["feats"], weight, data.params["k1.conv.bias"])
    assert_close(out, data.outputs["out_k1"], OUTPUT)


@over("sparse_spatial*")
def test_mean_pool_and_group_norm(name):
    data = golden(name)
    voxels, order = sorted_voxels(data.inputs["coords"])
    x = data.inputs["feats"][order]
    for factor in data.config["factors"]:
        coarse_x, coarse = mean_pool(x, voxels, factor)
        expected = data.outputs[f"down{factor}_coords"]
        assert_same_set(coarse.coords, expected)
        assert_close(coarse_x[rows_of(coarse.coords, expected)], data.outputs[f"down{factor}_feats"], OUTPUT)

    norm = PackedGroupNorm(data.config["num_groups"], data.config["channels"])
    norm.load_state_dict(data.params)
    assert_close(norm(x, voxels), data.outputs["groupnorm"][order], OUTPUT, "groupnorm")


# --- SDF VAE


@cache
def sdf_vae(name: str) -> tuple[Golden, SDFVAE]:
    data = golden(name)
    config = data.config
    model = SDFVAE(
        SDFVAEConfig(
            latent_channels=config["embed_dim"],
            hidden_size=config["model_channels_encoder"],
            num_heads=config["num_heads_encoder"],
            encoder_depth=config["num_blocks_encoder"],
            decoder_depth=config["num_blocks_decoder"],
            group_norm_groups=config.get(GROUPS, 32),
        )
    )
    model.load_state_dict(sdf_vae_state_dict(data.params))
    return data, model.requires_grad_(False)


@cache
def decoded(name: str) -> tuple[torch.Tensor, torch.Tensor, Voxels]:
    data, model = sdf_vae(name)
    voxels, order = Voxels.sort(data.inputs["latent_coords"], data.config["resolution"])
    return model.decode_with_features(data.inputs["latents"][order], voxels, data.meta["factor"])


def nested_children(coords: torch.Tensor) -> torch.Tensor:
    """Subdivide coords (N, 4) three times -> (512 N, 4), eight consecutive children for each parent."""
    child = torch.tensor([[0, i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    for _ in range(3):
        coords = (coords[:, None] * torch.tensor([1, 2, 2, 2]) + child).flatten(0, 1)
    return coords


@over("sparse_vae*", holding="outputs/mean")
def test_sdf_encoder(name):
    data, model = sdf_vae(name)
    coords = torch.cat([data.inputs["batch_idx"][:, None], data.inputs["sparse_index"]], dim=1).int()
    voxels, order = Voxels.sort(coords, 8 * data.config["resolution"])
    mean, logvar, latent_voxels = model.encode(data.inputs["sparse_sdf"][order, None], voxels, data.meta["factor"])
    expected = data.outputs["latent_index"]
    assert_same_set(latent_voxels.coords, expected)
    rows = rows_of(latent_voxels.coords, expected)
    assert_close(mean[rows], data.outputs["mean"], data.tolerance("outputs/mean", OUTPUT), "mean")
    assert_close(logvar[rows], data.outputs["logvar"], data.tolerance("outputs/logvar", OUTPUT), "logvar")


@over("sparse_vae*", holding="outputs/mean")
def test_sdf_decoder(name):
    data, _ = sdf_vae(name)
    sdf, features, voxels = decoded(name)
    expected_coords = nested_children(data.inputs["latent_coords"].long())
    assert torch.equal(expected_coords[::64], data.outputs["sdf_coords_every_64"].long())
    assert len(voxels) == len(expected_coords)
    rows = rows_of(voxels.coords, expected_coords)
    assert_close(sdf[rows], data.outputs["sdf"], data.tolerance("outputs/sdf", TANH), "sdf")
    if "feat_every_16" in data.outputs:
        assert_close(features[rows[::16]], data.outputs["feat_every_16"], OUTPUT, "features")


@over("sparse_vae_chunk*")
def test_sdf_decoder_equals_chunked_decoder(name):
    """The released 1024³ decoder works in chunks; our decoder gives every voxel the same value in one piece."""
    chunked = golden(name)
    sdf, _, voxels = decoded(name.replace("_chunk", ""))
    assert len(voxels) == chunked.meta["unique_rows"]
    rows = rows_of(voxels.coords, chunked.outputs["coords_every_16"])
    assert_close(sdf[rows], chunked.outputs["sdf_every_16"], TANH)


# --- structure VAE


@cache
def structure_vae(name: str) -> tuple[Golden, StructureVAE]:
    data = golden(name)
    config = data.config
    model = StructureVAE(
        StructureVAEConfig(
            latent_channels=config["embed_dim"],
            encoder_widths=config["model_channels_encoder"],
            decoder_widths=config["model_channels_decoder"],
            encoder_res_blocks=config["num_res_blocks_encoder"],
            encoder_middle_blocks=config["num_res_blocks_middle_encoder"],
            decoder_res_blocks=config["num_res_blocks_decoder"],
            decoder_middle_blocks=config["num_res_blocks_middle_decoder"],
        )
    )
    model.load_state_dict(structure_vae_state_dict(data.params))
    return data, model.requires_grad_(False)


@over("dense_vae*")
def test_structure_encoder(name):
    data, model = structure_vae(name)
    mean, logvar = model.encode(data.inputs["occ"])
    assert_close(mean, data.outputs["mean"], data.tolerance("outputs/mean", OUTPUT), "mean")
    assert_close(logvar, data.outputs["logvar"], data.tolerance("outputs/logvar", OUTPUT), "logvar")


@over("dense_vae*")
def test_structure_decoder(name):
    data, model = structure_vae(name)
    logits = model.decode(data.inputs["z"])
    assert_close(logits, data.outputs["logits"], data.tolerance("outputs/logits", OUTPUT), "logits")
    for item in range(len(logits)):
        voxels = model.occupied(logits[item : item + 1])
        assert_same_set(voxels.coords, data.outputs[f"index_item{item}"].int())


# --- the released checkpoints


@pytest.mark.parametrize(
    ("file", "make", "translate"),
    [
        ("model_dense.ckpt", lambda: StructureVAE(StructureVAEConfig()), structure_vae_state_dict),
        ("model_sparse_512.ckpt", lambda: SDFVAE(SDFVAEConfig()), sdf_vae_state_dict),
        ("model_sparse_1024.ckpt", lambda: SDFVAE(SDFVAEConfig()), sdf_vae_state_dict),
    ],
)
def test_default_sizes_hold_the_released_weights(file, make, translate):
    with torch.device("meta"):
        model = make()
        official = {key: torch.empty(shape) for key, shape in released_shapes("v1.0", file, "vae").items()}
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in translate(official).items()} == expected
