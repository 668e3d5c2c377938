"""The model folder: saved networks load again, and every possible fault is named in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3ds2.networks import CLASSES, network_classes
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from d3ds2.networks.model_files import load_model, load_network, save_network
from d3ds2.networks.refiner import SignRefiner, SignRefinerConfig
from d3ds2.storage.model_folder import (
    ALL_NETWORKS,
    NETWORKS,
    FineSamplingConfig,
    ModelFolderError,
    SamplingConfig,
    load_settings,
    save_settings,
)
from tests.support.tiny_model import write_model

CONFIG = ImageEncoderConfig(image_size=28, hidden_size=12, depth=1, num_heads=1, mlp_ratio=1, num_registers=2)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_network(tmp_path, "image_encoder", ImageEncoder(CONFIG))
    return tmp_path


def edit(folder, change):
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def test_saved_network_loads_bit_for_bit(tmp_path):
    encoder = ImageEncoder(CONFIG)
    save_network(tmp_path / "new" / "model", "image_encoder", encoder)
    loaded = load_network(tmp_path / "new" / "model", "image_encoder")
    assert loaded.config == CONFIG and not loaded.training
    for (name, a), b in zip(encoder.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(2, 4, 28, 28)
    assert torch.equal(encoder(images).features, loaded(images).features)


def test_half_precision_file_loads_in_float32(folder):
    save_network(folder, "image_encoder", ImageEncoder(CONFIG), dtype=torch.float16)
    stored = load_file(folder / "image_encoder.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = load_network(folder, "image_encoder")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(stored[k].float(), v) for k, v in loaded.state_dict().items())
    assert {p.dtype for p in load_network(folder, "image_encoder", dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_every_network_of_a_model_folder_has_its_classes():
    assert tuple(CLASSES) == ALL_NETWORKS
    for name in ALL_NETWORKS:
        config_class, network_class = network_classes(name)
        assert issubclass(network_class, torch.nn.Module) and network_class.__name__ + "Config" == config_class.__name__


def test_settings_and_networks_are_kept_apart(folder):
    sampling = SamplingConfig(sdf_resolution=128, structure_steps=3, latent_guidance=2.0)
    save_settings(folder, "test", sampling)
    save_network(folder, "image_encoder", ImageEncoder(CONFIG))
    assert load_settings(folder) == ("test", sampling)
    assert load_network(folder, "image_encoder").config == CONFIG


def test_values_beyond_half_precision_are_refused(folder):
    encoder = ImageEncoder(CONFIG)
    encoder.embeddings.cls_token.data[0, 0, 0] = 1e6
    before = (folder / "image_encoder.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"embeddings\.cls_token is not in torch\.float16"):
        save_network(folder, "image_encoder", encoder, dtype=torch.float16)
    assert (folder / "image_encoder.safetensors").read_bytes() == before


def test_another_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a ImageEncoder for image_encoder, got a Linear"):
        save_network(tmp_path, "image_encoder", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a network of"):
        save_network(tmp_path, "encoder", ImageEncoder(CONFIG))


def test_a_failed_write_leaves_the_old_file_and_no_other(folder, monkeypatch):
    before = (folder / "image_encoder.safetensors").read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("d3ds2.storage.model_folder.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_network(folder, "image_encoder", ImageEncoder(CONFIG))
    assert (folder / "image_encoder.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "image_encoder.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["networks"]["image_encoder"].update(widht=3), r"unknown key networks\.image_encoder\.widht"),
        (lambda s: s["networks"]["image_encoder"].update(depth="4"), r"networks\.image_encoder\.depth: expected int"),
        (lambda s: s["networks"]["image_encoder"].update(image_size=29), "expected image_size divisible by 14, got 29"),
        (lambda s: s["networks"].update(image_encoder=[1]), r"networks\.image_encoder: expected a table"),
        (lambda s: s["networks"].update(denoiser={}), "unknown network denoiser"),
        (lambda s: s["networks"].clear(), "has no image_encoder; it has none"),
        (lambda s: s.update(networks=3), "networks: expected a table, got 3"),
        (lambda s: s.update(format=2), "expected a model of format 1"),
        (lambda s: s.update(smapling={}), "unknown key smapling"),
        (lambda s: s["networks"]["image_encoder"].update(hidden_size=24), "has misshapen tensors: .* instead of"),
        (lambda s: s["networks"]["image_encoder"].update(depth=2), r"misses tensors: encoder\.layer\.1\..* more"),
    ],
)
def test_wrong_config_is_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ModelFolderError, match=message) as raised:
        load_network(folder, "image_encoder")
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_wrong_sampling_is_named(folder):
    edit(folder, lambda s: s.update(sampling={"sdf_resolution": 100}))
    with pytest.raises(ModelFolderError, match="expected sdf_resolution divisible by 64 up to 2048, got 100"):
        load_settings(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -50])
def test_truncated_weights_are_named(folder, size):
    file = folder / "image_encoder.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelFolderError, match=r"damaged file .*image_encoder\.safetensors"):
        load_network(folder, "image_encoder")


def test_missing_and_damaged_files_are_named(folder):
    tensors = load_file(folder / "image_encoder.safetensors")
    save_file(tensors | {"extra": torch.zeros(1)}, folder / "image_encoder.safetensors")
    with pytest.raises(ModelFolderError, match="has unexpected tensors: extra"):
        load_network(folder, "image_encoder")
    (folder / "image_encoder.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="missing file"):
        load_network(folder, "image_encoder")
    (folder / "config.json").write_text('{"format": 1,')
    with pytest.raises(ModelFolderError, match="damaged file"):
        load_network(folder, "image_encoder")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFolderError, match="damaged file"):
        load_network(folder, "image_encoder")
    (folder / "config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"no config\.json in"):
        load_network(folder, "image_encoder")
    with pytest.raises(ModelFolderError, match="no model folder"):
        load_network(folder / "absent", "image_encoder")


def test_a_folder_may_hold_networks_of_a_second_stage(tmp_path):
    folder = write_model(tmp_path / "model")
    sizes = {"widths": (4, 8), "layers": 1, "middle_layers": 0, "patch_size": 16}
    assert load_model(folder)[0].keys() == {*NETWORKS}
    refiner = SignRefiner(SignRefinerConfig(**sizes))
    save_network(folder, "fine_refiner", refiner)
    save_settings(folder, "two stages", SamplingConfig(sdf_resolution=64, level=0.2, fine=FineSamplingConfig(128)))
    networks, sampling = load_model(folder)
    assert networks.keys() == {*NETWORKS} | {"fine_refiner"}
    assert sampling.fine == FineSamplingConfig(128, 15, 8.0, 7.0)
    for key, tensor in networks["fine_refiner"].state_dict().items():
        assert torch.equal(tensor, refiner.state_dict()[key]), key


@pytest.mark.parametrize("change", [{"sdf_resolution": 100}, {"steps": 0}, {"shift": 0.0}])
def test_fine_sampling_is_checked(change):
    with pytest.raises(ValueError, match="expected"):
        FineSamplingConfig(**change)
