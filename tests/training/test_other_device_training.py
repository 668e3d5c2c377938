"""The whole chain of training runs on a device that is neither a CPU nor CUDA, with the losses of a CPU."""

import dataclasses

import pytest
from torch import Tensor

from d3ds2.networks.sdf_vae import SDFVAEConfig
from tests.support.other_device import OtherTensor, other_device
from tests.support.training_data import R, prepared
from tests.training.test_train_diffusion import Chain, losses
from training import distributed, encode_latents, train_dit, train_structure_dit, train_structure_vae, train_vae
from training.train_vae import TrainVAEConfig

MODEL = SDFVAEConfig(
    latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=2,
    voxel_place=True,
)  # fmt: skip


def train_all(chain: Chain, tensor_type: type) -> list[float]:
    """Train every network for two steps, with weights of this type; return the losses."""
    vae = TrainVAEConfig(chain.data_dir, chain.model_dir, resolutions=(R,), model=MODEL, run=chain.run("vae", steps=2))
    found = []
    for module, config in (
        (train_structure_vae, chain.structure_vae),
        (train_structure_dit, chain.structure_dit),
        (train_vae, vae),
        (encode_latents, chain.latents),
        (train_dit, chain.dit),
    ):
        if module is encode_latents:
            few_batches = dataclasses.replace(config, splits=("train",), max_tokens=10_000)  # each operator takes long
            encode_latents.main(few_batches)
            continue
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2, workers=0))
        assert all(isinstance(weight.data, tensor_type) for weight in module.train(config).parameters())
        found += losses(config)
    return found


@pytest.mark.long
def test_every_network_trains(tmp_path_factory, tmp_path, monkeypatch):
    data_dir = prepared(tmp_path_factory)
    for name in ("on_cpu", "there"):
        (tmp_path / name).mkdir()
    expected = train_all(Chain(data_dir, tmp_path / "on_cpu"), Tensor)
    with other_device("privateuseone") as device:
        monkeypatch.setattr(distributed, "find_device", lambda name: device)
        actual = train_all(Chain(data_dir, tmp_path / "there"), OtherTensor)
    assert actual == pytest.approx(expected, rel=1e-3)
