"""Ranks on GPUs, started by torchrun, with sums by nccl: as many as there are, one suffices."""

import pytest
import torch

from tests.support.training_chain import Chain
from tests.support.training_data import prepared, write_toml
from tests.training.test_distributed import STAGES, configs_in, difference, errors_of, torchrun, train_alone
from training.run import read_metrics

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    """A model folder from which each stage can start."""
    return train_alone(Chain(prepared(tmp_path_factory), tmp_path_factory.mktemp("gpu_ranks")))


@pytest.mark.parametrize("name", STAGES)
def test_ranks_on_gpus_train_as_one_process(chain, tmp_path, name):
    """Whole and sharded weights, a resume from the one to the other, and one process end with the same weights."""
    module = STAGES[name][0]
    size = torch.cuda.device_count()
    runs = {"alone": [(0, False, 6)], "ranks": [(size, False, 6)], "mixed": [(size, True, 3), (0, False, 6)]}
    for folder, parts in runs.items():
        for ranks, sharded, steps in parts:  # no ranks: in this process
            config = configs_in(chain, tmp_path / folder, steps=steps, sharded=sharded, device="cuda", precision="fp32")
            if not ranks:
                module.train(config[name])
                continue
            write_toml(tmp_path / "stage.toml", config[name])
            ended = torchrun(ranks, tmp_path, module.__name__, str(tmp_path / "stage.toml"))
            assert ended.returncode == 0, errors_of(tmp_path)
    alone = tmp_path / "alone" / name / "run"
    for folder in ("ranks", "mixed"):
        run = tmp_path / folder / name / "run"
        assert difference(alone, run, "model") < 1e-3 and difference(alone, run, "ema") < 1e-3
        for a, b in zip(read_metrics(alone), read_metrics(run), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
