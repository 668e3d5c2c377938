"""The parity files themselves: which must exist, and which parameters follow from a recipe."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.golden import ROOT, SMALL, golden, keys_of, over, parity_folder, recipe_parameters
from tests.support.parity_like import write_collection

FAMILIES = (  # beginnings of the names in @over of test_parity_*.py, test_mesh_to_structure.py and this file
    "block_score_", "dense_dit", "dense_vae", "embedders", "latent_index_", "mesh_index", "preprocess_image",
    "refiner_sign", "refiner_xl", "sampler_", "scheduler", "sort_extract", "sparse_dit_", "sparse_spatial",
    "sparse_vae", "ssa_v1", "torchsparse_conv3d", "window_attention",
)  # fmt: skip


def test_every_file_of_the_small_folder_is_in_the_whole():
    expected = {path.name for path in SMALL.iterdir() if path.suffix in (".json", ".safetensors")}
    assert len(expected) == 35
    whole = parity_folder() if "D3DS2_PARITY" not in os.environ else SMALL  # another folder may hold other files
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


def run_parity_tests(folder, chosen="not another_collection and not small_folder and not released"):
    """Run the parity tests on another folder in a new process; return it, and how many tests had each outcome."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    files = [str(path) for path in sorted((ROOT / "tests" / "parity").glob("test_parity_*.py"))]
    environment = os.environ | {"D3DS2_PARITY": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-k", chosen, *files], env=environment, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    return done, counts


@pytest.mark.long
def test_the_files_of_another_collection_pass(tmp_path):
    """Accept other sizes, seeds, names and numbers of samples; then change one tensor in each of three files."""
    write_collection(tmp_path)
    done, counts = run_parity_tests(tmp_path)
    assert done.returncode == 0 and counts.keys() == {"passed"} and counts["passed"] > 30, done.stdout
    changed = {"sparse_vae_b": "outputs/mean", "refiner_xl_run_b": "outputs/volume", "ssa_v10_grads_b": "grads/x"}
    for name, key in changed.items():
        tensors = load_file(tmp_path / f"{name}.safetensors")
        tensors[key] = tensors[key] * 1.001
        save_file(tensors, tmp_path / f"{name}.safetensors")
    done, counts = run_parity_tests(tmp_path, " or ".join(["sparse_vae_b", "refiner_xl_run_b", "ssa_v10_b"]))
    assert counts["failed"] == 3 and {*re.findall(r"FAILED \S+\[(\w+)\]", done.stdout)} == {
        "sparse_vae_b", "refiner_xl_run_b", "ssa_v10_b"
    }, done.stdout  # fmt: skip
