"""Any model folder is loaded as it was written, or ends in one clear error before anything large is made."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from d3ds2.networks import network_classes
from d3ds2.networks.model_files import load_model, load_network, save_network
from d3ds2.pipeline import build_pipeline
from d3ds2.storage.model_folder import ModelFolderError, load_settings, network_names
from tests.support.bounded import as_nobody, outcome
from tests.support.hostile import changed_tree, damaged
from tests.support.tiny_model import write_model

NAMES = ("image_encoder", "structure_vae", "structure_dit", "latent_dit", "sdf_vae", "refiner")
MORE = 200 << 20  # bytes that loading a model of 1 MB may take
DTYPES = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn, torch.int32)
VALUES = (float("nan"), float("inf"), float("-inf"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"))
    config_class, network_class = network_classes("refiner")
    save_network(folder, "refiner", network_class(config_class(widths=(4, 8), patch_size=16, feature_channels=4)))
    load_model(folder)  # imports what loading needs
    return folder


@pytest.fixture(scope="module")
def case(model, tmp_path_factory):
    """A copy of the model, of which each case changes one file."""
    return shutil.copytree(model, tmp_path_factory.mktemp("case") / "model")


def load_all(folder: Path):
    """Load a model as the command line does."""
    load_settings(folder), network_names(folder)
    return build_pipeline(*load_model(folder))


def load_one(folder: Path, name: str):
    return load_network(folder, name)


def assert_same(network, folder: Path, name: str) -> None:
    for key, tensor in load_file(folder / f"{name}.safetensors").items():
        assert torch.equal(network.state_dict()[key], tensor.float()), key


@given(data=st.data())
def test_any_config_is_loaded_or_refused(model, case, data):
    settings = json.loads((model / "config.json").read_text())
    changed = data.draw(changed_tree(settings))
    (case / "config.json").write_text(json.dumps(changed))
    found = outcome(lambda: load_all(case), ModelFolderError, resident=MORE)
    if not isinstance(found, ModelFolderError):
        assert_same(
            found.latent_dit if hasattr(found, "latent_dit") else found.stages[0].latent_dit, model, "latent_dit"
        )
    (case / "config.json").write_bytes((model / "config.json").read_bytes())


@given(data=st.data())
def test_any_number_in_the_config_of_a_network_is_loaded_or_refused(model, case, data):
    name = data.draw(st.sampled_from(NAMES))
    settings = json.loads((model / "config.json").read_text())
    settings["networks"][name] = data.draw(changed_tree(settings["networks"][name]))
    (case / "config.json").write_text(json.dumps(settings))
    found = outcome(lambda: load_one(case, name), ModelFolderError, resident=MORE)
    if not isinstance(found, ModelFolderError):
        assert_same(found, model, name)
    (case / "config.json").write_bytes((model / "config.json").read_bytes())


@st.composite
def changed_tensors(draw, tensors):
    """Draw tensors of which one was given another kind of number, value, shape or name."""
    key, tensors = draw(st.sampled_from(sorted(tensors))), dict(tensors)
    action = draw(st.sampled_from(("dtype", "value", "shape", "name", "missing", "empty", "half")))
    if action == "dtype":
        tensors[key] = tensors[key].to(draw(st.sampled_from(DTYPES)))
    elif action == "value":
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[draw(st.integers(0, tensors[key].numel() - 1))] = draw(st.sampled_from(VALUES))
    elif action == "shape":
        tensors[key] = tensors[key][None]
    elif action == "name":
        tensors["<b>" + key] = tensors.pop(key)
    elif action == "missing":
        del tensors[key]
    elif action == "empty":
        tensors[key] = torch.zeros(0)
    else:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    return action, key, tensors


@given(data=st.data())
def test_any_weights_are_loaded_or_refused(model, case, data):
    name = data.draw(st.sampled_from(NAMES))
    file = case / f"{name}.safetensors"
    if data.draw(st.booleans()):
        action, key, tensors = data.draw(changed_tensors(load_file(model / file.name)))
        save_file(tensors, file)
    else:
        action, key = "bytes", None
        file.write_bytes(data.draw(damaged((model / file.name).read_bytes())))
    found = outcome(lambda: load_one(case, name), ModelFolderError, resident=MORE)
    if isinstance(found, ModelFolderError):
        assert str(file) in str(found) and action != "half"
        assert key is None or key in str(found)
    else:
        assert action in ("bytes", "half")
        assert all(value.isfinite().all() for value in found.state_dict().values())
    file.write_bytes((model / file.name).read_bytes())


HUGE = 10**9


def change(folder: Path, name: str, **values) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["networks"][name] |= values
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.fixture
def copied(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("image_encoder", {"depth": HUGE}, "expected depth from 1 to 256, got 1000000000"),
        ("image_encoder", {"image_size": 14 * HUGE}, "expected image_size from 1 to 4096"),
        ("image_encoder", {"hidden_size": 48}, r"misshapen tensors: .*\(1, 1, 24\) instead of \(1, 1, 48\)"),
        ("structure_dit", {"resolution": HUGE}, "expected resolution from 1 to 64"),
        (
            "structure_dit",
            {"hidden_size": 65536, "resolution": 64},
            r"tensors: .* instead of \(65536, 65536\)",
        ),
        ("structure_dit", {"num_heads": 0}, "expected num_heads from 1 to 65536, got 0"),
        ("structure_dit", {"mlp_ratio": 1e308}, "expected mlp_ratio from 1 to 64, got 1e\\+308"),
        ("latent_dit", {"mlp_ratio": float("nan")}, "expected a finite mlp_ratio, got nan"),
        ("latent_dit", {"hidden_size": -64}, "expected hidden_size from 1 to 65536, got -64"),
        ("latent_dit", {"position_factor": 10**400}, "expected a number below 1e308, got one of 401 digits"),
        ("sdf_vae", {"latents_scale": float("inf")}, "expected a finite latents_scale, got inf"),
        ("sdf_vae", {"decoder_depth": HUGE}, "expected decoder_depth from 1 to 256"),
        (
            "structure_vae",
            {"encoder_widths": [8] * 100, "decoder_widths": [8] * 100},
            "at most 8 encoder_widths",
        ),
        ("structure_vae", {"decoder_res_blocks": 40}, "misses tensors: .* more"),
        ("refiner", {"widths": [4, HUGE]}, "expected widths from 1 to 65536"),
        ("refiner", {"patch_size": HUGE}, "expected patch_size from 1 to 512"),
    ],
)
def test_sizes_are_refused_before_anything_is_made(copied, name, values, message):
    change(copied, name, **values)
    error = outcome(lambda: load_one(copied, name), ModelFolderError, resident=MORE)
    assert isinstance(error, ModelFolderError) and re.search(message, str(error)), error


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_another_kind_are_named(copied, dtype):
    tensors = load_file(copied / "sdf_vae.safetensors")
    tensors["decoder.out_layer.bias"] = tensors["decoder.out_layer.bias"].to(dtype)
    save_file(tensors, copied / "sdf_vae.safetensors")
    error = outcome(lambda: load_one(copied, "sdf_vae"), ModelFolderError)
    assert re.search(
        r"no floats in tensors: decoder\.out_layer\.bias of \S+ instead of F16, BF16, F32, F64", str(error)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", VALUES)
def test_weights_that_are_not_finite_are_named(copied, dtype, value):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(copied / "sdf_vae.safetensors").items()}
    save_file(tensors, copied / "sdf_vae.safetensors")
    assert outcome(lambda: load_one(copied, "sdf_vae")).config.hidden_size == 64
    tensors["decoder.out_layer.weight"][0, 1] = value
    save_file(tensors, copied / "sdf_vae.safetensors")
    error = outcome(lambda: load_one(copied, "sdf_vae"), ModelFolderError)
    assert "has values that are not finite: decoder.out_layer.weight" in str(error)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"structure_steps": 10**12}, "expected at most 10000 steps, got 1000000000000"),
        ({"latent_guidance": float("nan")}, "expected finite numbers, got nan"),
        ({"latent_shift": float("inf")}, "expected finite numbers, got inf"),
        ({"sdf_resolution": 64 * HUGE}, "divisible by 64 up to 2048, got 64000000000"),
        ({"fine": {"steps": 2**64}}, "expected at most 10000 steps"),
        ({"fine": {"guidance": float("-inf")}}, "expected finite numbers, got -inf"),
        ({"level": float("nan")}, r"expected a level in \(-1, 1\), got nan"),
        ("deep", "damaged file .*config.json"),
        ("large", "expected a config.json of at most 1,048,576 bytes"),
    ],
)
def test_sampling_out_of_range_is_named(copied, sampling, message):
    settings = json.loads((copied / "config.json").read_text())
    text = json.dumps(settings | {"sampling": sampling})
    if isinstance(sampling, str):
        text = "[" * 100_000 if sampling == "deep" else " " * (1 << 21)
    (copied / "config.json").write_text(text)
    error = outcome(lambda: load_settings(copied), ModelFolderError)
    assert re.search(message, str(error)) and str(copied) in str(error)


def test_names_and_links_that_lead_nowhere_are_one_line(copied, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for path in ("x" * 300, "a\0b", "a\nb", "/".join(["y" * 200] * 30), "loop", "loop/x", "dangling", "\udc80", "<b>"):
        for call in (load_settings, network_names, load_model, lambda folder: load_network(folder, "sdf_vae")):
            error = outcome(lambda call=call, path=path: call(tmp_path / path), ModelFolderError)
            assert isinstance(error, ModelFolderError)
    for name in ("sdf_vae.safetensors", "config.json"):
        for target in ("loop", "dangling", "."):
            (copied / name).unlink()
            (copied / name).symlink_to(tmp_path / target)
            assert isinstance(outcome(lambda: load_one(copied, "sdf_vae"), ModelFolderError), ModelFolderError)
    (copied / "sdf_vae.safetensors").unlink()
    (copied / "config.json").unlink()


def test_a_folder_without_permission_is_one_line(copied):
    (copied / "config.json").chmod(0)
    for path, what in ((copied, "config.json"), (copied / "x", "x")):
        with as_nobody(copied):
            error = outcome(lambda path=path: load_settings(path), ModelFolderError)
        assert isinstance(error, ModelFolderError) and what in str(error)
    copied.chmod(0)
    with as_nobody(copied.parent):
        error = outcome(lambda: load_settings(copied), ModelFolderError)
    assert "Permission denied" in str(error) and str(copied) in str(error)
    copied.chmod(0o755)
