"""The parity files themselves: those that must be here, and parameters that follow from their recipe."""

import os

import pytest
import torch

from tests.parity import ROOT, golden, keys_of, over, parity_folder, recipe_parameters

SMALL = ROOT / "tests" / "data" / "parity"
FAMILIES = (  # of names in @over of test_parity_*.py, test_mesh_to_structure.py and here
    "block_score_", "dense_dit", "dense_vae", "embedders", "latent_index_", "mesh_index", "preprocess_image",
    "refiner_sign", "refiner_xl", "sampler_", "scheduler", "sort_extract", "sparse_dit_", "sparse_spatial",
    "sparse_vae", "ssa_v1", "torchsparse_conv3d", "window_attention",
)  # fmt: skip


def test_every_file_of_the_small_folder_is_in_the_whole():
    expected = {path.name for path in SMALL.iterdir() if path.suffix in (".json", ".safetensors")}
    assert len(expected) == 35
    whole = parity_folder() if "D3DS2_PARITY" not in os.environ else SMALL  # another folder may hold what it likes
    assert expected <= {path.name for path in whole.iterdir()}
    for path in SMALL.glob("*.safetensors"):
        assert keys_of(path) <= keys_of(whole / path.name), path.name


def test_every_file_has_a_test():
    names = {path.stem for path in parity_folder().glob("*.safetensors")}
    assert names and not {name for name in names if not name.startswith(FAMILIES)}
    assert all((parity_folder() / f"{name}.json").is_file() for name in names)


def test_a_named_folder_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("D3DS2_PARITY", str(tmp_path))
    assert parity_folder() == tmp_path
    monkeypatch.setenv("D3DS2_PARITY", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"D3DS2_PARITY names .*absent, which is not a folder"):
        parity_folder()


@over("embedders*", "dense_*", "refiner_*", "sparse_*", "ssa_v1*", holding="params/")
def test_recipe_gives_the_stored_parameters(name):
    data = golden(name)
    recipe = recipe_parameters(data.meta)
    assert recipe and recipe.keys() == data.params.keys() - {"pos_emb"}  # a buffer
    for key, parameter in recipe.items():
        assert torch.equal(parameter, data.params[key]), key


@over("refiner_*_full*", "sampler_sparse*", "sparse_dit_*_wide*", "sparse_vae_full*")
def test_recipe_gives_the_sums_of_parameters_that_are_not_stored(name):
    data = golden(name)
    parameters = [parameter.double() for parameter in data.params.values()]
    assert sum(p.sum().item() for p in parameters) == pytest.approx(data.meta["param_sum_f64"], rel=1e-12)
    assert sum(p.abs().sum().item() for p in parameters) == pytest.approx(data.meta["param_abs_sum_f64"], rel=1e-12)
