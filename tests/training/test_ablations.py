"""The ablations: their config files, and the script that trains, scores and compares them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import ablations
from benchmarks.ablations import AblationsConfig
from d3ds2.networks.latent_dit import LatentDiT
from tests.support.training_chain import Chain, save_untrained
from tests.support.training_data import prepared, write_toml
from training.config import load_config
from training.run_folder import last_step
from training.train_dit import TrainDiTConfig

CONFIGS = Path(__file__).parents[2] / "training/configs"
FORMS = {path.stem for path in (CONFIGS / "ablations").glob("*.toml")} - {"base"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> AblationsConfig:
    """Two of the forms over a small base, one step of each, with a model of random weights."""
    folder = tmp_path_factory.mktemp("ablations")
    chain = Chain(prepared(tmp_path_factory), folder)
    save_untrained(chain)
    model = dataclasses.replace(chain.dit.model, pooled_conv=False)
    write_toml(folder / "base.toml", dataclasses.replace(chain.dit, model=model))
    for form in ("ssa", "sequence"):
        shutil.copy(CONFIGS / "ablations" / f"{form}.toml", folder)
    return AblationsConfig(
        str(folder), start_from=chain.model_dir, data_dir=chain.data_dir, out_dir=str(folder / "runs"), seeds=(0, 1),
        steps=2, times=2, sampling_steps=2, num_points=200, cells=16, device="cpu", workers=1,
        overrides=("run.workers=0",),
    )  # fmt: skip


def test_every_form_states_only_what_differs_from_the_base():
    base = load_config(TrainDiTConfig, [str(CONFIGS / "ablations/base.toml")])
    tiny = load_config(TrainDiTConfig, [str(CONFIGS / "tiny_dit.toml")])
    assert base.model == dataclasses.replace(tiny.model, surplus_value=0.0)  # they learn on true structures
    changes = {}
    for form in FORMS:
        config = load_config(TrainDiTConfig, [str(CONFIGS / "ablations" / f"{form}.toml")])
        assert dataclasses.replace(config, model=base.model) == base
        before, after = dataclasses.asdict(base.model), dataclasses.asdict(config.model)
        changes[form] = {key: after[key] for key in after if after[key] != before[key]}
        LatentDiT(config.model)
    assert changes == {
        "window": {"branches": ("window",)},
        "window_compression": {"branches": ("compression", "window")},
        "ssa": {},
        "no_window": {"branches": ("compression", "selection")},
        "full": {"attention": "full", "packing_channels": 32, "num_kv_heads": 16},
        "sequence": {"attention": "sequence"},
        "all_patches": {"sparse_context": False},
    }
    plan = load_config(AblationsConfig, [str(CONFIGS / "ablations.toml")])
    assert set(plan.seeds) == {0, 1, 2} and plan.compared_with in FORMS


def test_a_config_may_build_on_another(tmp_path):
    (tmp_path / "below.toml").write_text("batch_size = 3\n[run]\nsteps = 5\nseed = 7\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/above.toml").write_text('base = "../below.toml"\n[run]\nsteps = 6\n')
    config = load_config(TrainDiTConfig, [str(tmp_path / "deep/above.toml"), "run.accumulate=2"])
    assert (config.batch_size, config.run.steps, config.run.seed, config.run.accumulate) == (3, 6, 7, 2)
    (tmp_path / "below.toml").write_text("batch_size = ")
    with pytest.raises(ValueError, match=r"expected TOML in .*below\.toml"):
        load_config(TrainDiTConfig, [str(tmp_path / "deep/above.toml")])


@pytest.mark.long
def test_forms_are_trained_scored_and_compared(comparison, monkeypatch):
    assert ablations.run(comparison, "sequence", 0, 1e-9, pool=None) is None
    assert last_step(Path(comparison.out_dir) / "sequence_0/run") == 1  # of 2
    assert ablations.main(dataclasses.replace(comparison, max_minutes=1e-9)) == {}
    text = (Path(comparison.out_dir) / "ablations.md").read_text()
    assert "Not finished: sequence 0, sequence 1, ssa 0, ssa 1; the same command continues." in text
    summary = ablations.main(comparison)
    assert summary.keys() == {"sequence", "ssa"}
    for form in summary.values():
        assert form["seeds"] == [0, 1] and form["loss"]["count"] == 1 and form["loss"]["mean"] > 0
        assert len(set(form["loss"]["by_seed"].values())) == 2
    assert summary["ssa"]["loss"]["mean"] != summary["sequence"]["loss"]["mean"]
    text = (Path(comparison.out_dir) / "ablations.md").read_text()
    assert "| minus ssa |" in text and "Not finished" not in text and text.count("\n| ssa | 2 |") == 1
    assert text.count("\n| sequence | 2 |") == 2  # its scores, and how far they are from those of ssa
    monkeypatch.setattr(ablations, "run", lambda *arguments: pytest.fail("trained again"))
    assert ablations.main(comparison) == json.loads(json.dumps(summary), object_hook=with_int_keys)


def with_int_keys(values: dict) -> dict:
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}
