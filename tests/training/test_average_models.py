"""Averages of models: the numbers, what is left as it was, and what cannot be averaged."""

import pytest
import torch

from d3ds2.networks.model_files import load_network
from d3ds2.storage.model_folder import ModelFolderError, load_settings, network_names
from tests.support.tiny_model import draw_object, write_model
from training.average_models import AverageModelsConfig, main

ENDS = ("structure_dit", "latent_dit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    return [str(write_model(parent / name, seed=seed)) for seed, name in enumerate("abc")]


def weights_of(folder, name):
    return load_network(folder, name).state_dict()


def test_the_mean_is_weighted_and_other_networks_stay(folders, tmp_path):
    main(AverageModelsConfig(tuple(folders), (2, 1, 1), ENDS, str(tmp_path / "mean"), "float32"))
    for name in network_names(folders[0]):
        parts, made = [weights_of(folder, name) for folder in folders], weights_of(tmp_path / "mean", name)
        for key, value in made.items():
            a, b, c = (part[key] for part in parts)
            expected = a / 2 + b / 4 + c / 4 if name in ENDS else a
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    assert load_settings(tmp_path / "mean") == load_settings(folders[0])


def test_all_networks_are_averaged_by_default_and_a_model_may_be_written_over(folders, tmp_path):
    from d3ds2.pipeline import load_pipeline

    main(AverageModelsConfig(tuple(folders[:2]), out=str(tmp_path / "mean")))
    before = weights_of(tmp_path / "mean", "sdf_vae")
    main(AverageModelsConfig((str(tmp_path / "mean"), folders[2]), (0, 1), out=str(tmp_path / "mean"), dtype="float32"))
    after, alone = weights_of(tmp_path / "mean", "sdf_vae"), weights_of(folders[2], "sdf_vae")
    assert all(torch.equal(after[key], alone[key]) for key in after)
    assert any(not torch.equal(after[key], before[key]) for key in after)
    assert len(load_pipeline(tmp_path / "mean").generate(draw_object()).faces)


def test_what_cannot_be_averaged_is_named_and_nothing_is_written(folders, tmp_path):
    wide = str(write_model(tmp_path / "wide", structure_dit={"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"structure_dit of the same sizes in .*a and .*wide, got others"):
        main(AverageModelsConfig((folders[0], wide), out=str(tmp_path / "mean")))
    with pytest.raises(ModelFolderError, match="has no refiner"):
        main(AverageModelsConfig(tuple(folders), networks=("refiner",), out=str(tmp_path / "mean")))
    assert not (tmp_path / "mean").exists()
    for values, message in (
        ({"models": ("a",)}, "at least two models, got 1"),
        ({"models": ("a", "b"), "weights": (1.0,)}, "a weight for each of 2 models, got 1"),
        ({"models": ("a", "b"), "weights": (1.0, -1.0)}, "not negative"),
        ({"models": ("a", "b"), "dtype": "int8"}, "expected a dtype of"),
    ):
        with pytest.raises(ValueError, match=message):
            AverageModelsConfig(**values)
