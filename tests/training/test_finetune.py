"""Fine-tuning by one command: a converted release with random weights learns two meshes, and loads without peft."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from d3ds2.networks.model_files import load_network
from d3ds2.official.convert import convert
from d3ds2.pipeline import load_pipeline
from d3ds2.storage.model_folder import load_settings, network_names
from tests.support.official_release import write_release
from tests.support.training_data import write_meshes
from training import finetune
from training.config import load_config
from training.data.latent_moments import moments_path, read_moments
from training.finetune import FinetuneConfig
from training.lora import LoRAConfig

CONFIG = Path(__file__).parents[2] / "training/configs/finetune.toml"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> FinetuneConfig:
    """Settings for two meshes and a small model of the released layout."""
    folder = tmp_path_factory.mktemp("finetune")
    write_release(folder / "release", "v1.1")
    convert(folder / "release", folder / "official")
    write_meshes(folder / "meshes")
    for name in ("box", "can", "pill"):
        next((folder / "meshes").glob(f"{name}.*")).unlink()
    (folder / "meshes/index.json").write_text(
        '[{"file": "ball.obj", "source": "ours", "split": "train"}, '
        '{"file": "torus.ply", "source": "ours", "split": "train"}]'
    )
    arguments = [f"meshes={folder / 'meshes'}", f"data_dir={folder / 'data'}", f"start_from={folder / 'official'}"]
    arguments += [f"model_dir={folder / 'mine'}", f"runs_dir={folder / 'runs'}", "workers=1"]
    arguments += ["views.views=1", "views.size=64", "views.supersample=1", "views.azimuth=[0, 0]"]
    for stage in ("structure_dit", "dit"):
        run = {"steps": 3, "device": "cpu", "workers": 0, "warmup_steps": 0, "tensorboard": "false"}
        arguments += [f"{stage}.batch_size=2", *(f"{stage}.run.{key}={value}" for key, value in run.items())]
    return load_config(FinetuneConfig, [str(CONFIG), *arguments])


def adapters(config: FinetuneConfig, rank: int, **changes) -> FinetuneConfig:
    stages = {
        stage: dataclasses.replace(getattr(config, stage), lora=LoRAConfig(rank)) for stage in ("structure_dit", "dit")
    }
    return dataclasses.replace(config, **stages, **changes)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_released_model_learns_two_meshes(base, tmp_path, monkeypatch, rank):
    if rank:
        pytest.importorskip("peft", reason="peft is not installed")
    config = adapters(base, rank, model_dir=str(tmp_path / "mine"), runs_dir=str(tmp_path / "runs"))
    finetune.main(config)
    with monkeypatch.context() as without_peft:
        without_peft.setitem(sys.modules, "peft", None)
        load_pipeline(config.model_dir)
    assert load_settings(config.model_dir) == ("mine", load_settings(config.start_from)[1])
    assert network_names(config.model_dir) == network_names(config.start_from)
    for name in network_names(config.start_from):
        old, new = (load_network(folder, name) for folder in (config.start_from, config.model_dir))
        assert old.config == new.config
        before, after = old.state_dict(), new.state_dict()
        assert before.keys() == after.keys()
        moved = {key for key in before if not torch.equal(before[key].half(), after[key].half())}  # trainers export so
        if name not in ("structure_dit", "latent_dit"):
            assert not moved
        elif rank:
            assert moved and all(key.split(".")[-2] in LoRAConfig().targets for key in moved)
        else:
            assert len(moved) > len(before) / 2
    moments = read_moments(moments_path(config.data_dir, 64))
    vae = load_network(config.model_dir, "sdf_vae").config
    assert (moments["latents_shift"], moments["latents_scale"]) == (vae.latents_shift, vae.latents_scale)
    files = {path: path.stat().st_mtime_ns for path in Path(config.model_dir).iterdir()}
    finetune.main(config)  # all is done
    assert {path: path.stat().st_mtime_ns for path in Path(config.model_dir).iterdir()} == files


@pytest.mark.long
def test_two_ranks_tune_as_one(base, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    from tests.training.test_distributed import on_ranks

    networks = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        config = adapters(base, 2, model_dir=str(folder / "mine"), runs_dir=str(folder / "runs"))
        if ranks == 1:
            finetune.main(config)
        else:
            on_ranks(2, lambda config=config: finetune.main(config))
        networks.append([load_network(config.model_dir, name) for name in ("structure_dit", "latent_dit")])
    for one, two in zip(*networks, strict=True):
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)  # stored in float16


def test_the_model_folder_is_not_its_own_start(base):
    with pytest.raises(ValueError, match="expected another model_dir than start_from"):
        dataclasses.replace(base, model_dir=base.start_from)
