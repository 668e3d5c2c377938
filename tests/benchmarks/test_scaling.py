"""The benchmark of several GPUs, small and on the CPU."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.scaling_work import CASES, Work, tokens_of, train
from tests.training.test_distributed import on_ranks
from training.distributed import Ranks, ranks_on

LONG_CASES = ("latent DiT 512", "latent DiT 1024", "SDF VAE 384")


@pytest.mark.parametrize(
    "case", ["structure DiT", *(pytest.param(case, marks=pytest.mark.long) for case in LONG_CASES)]
)
def test_ranks_measure_a_case(tmp_path, case):
    work = Work(case, str(tmp_path / "result.json"), batch=4, steps=2, warm_up=1, tiny=True, sharded=True)
    on_ranks(2, lambda: train(work))
    found = json.loads(Path(work.out).read_text())
    assert list(found["ms"]) == ["data", "compute", "wait for the slowest", "update"]
    assert all(ms > 0 for ms in found["ms"].values()) and found["imbalance"] >= 1 and len(found["losses"]) == 3
    data = CASES[case][0](work).data
    assert found["tokens"] == (data.sizes(1).sum() + data.sizes(2).sum()) / 2


def test_shapes_have_their_blocks_in_order():
    blocks = CASES["SDF VAE 384"][0](Work("", "", batch=4)).data.load(0, np.arange(4)).block_coords.numpy()
    assert len(blocks) > 20000 and (np.lexsort(blocks.T[::-1]) == np.arange(len(blocks))).all()


def test_samples_are_the_same_in_any_part():
    data = CASES["latent DiT 256"][0](Work("", "", batch=4, tiny=True)).data
    whole, part = data.load(5, np.arange(4)), data.load(5, np.arange(2, 4))
    assert whole.mean[whole.coords[:, 0] >= 2].equal(part.mean) and part.mean.std() > 0.9


def test_tokens_of_the_ranks_are_those_of_the_batch():
    ranks = ranks_on("cpu")
    data = CASES["latent DiT 512"][0](Work("latent DiT 512", "", batch=8, tiny=True)).data
    own = [tokens_of(data, 3, Ranks(ranks.device, rank, 3), accumulate=2) for rank in range(3)]
    assert sum(own) == data.sizes(3).sum() and len(set(data.sizes(3))) > 1


@pytest.mark.long
def test_whole_benchmark_on_two_ranks(tmp_path, monkeypatch, capfd):
    cases = ["structure DiT", "latent DiT 256"]
    arguments = ["--tiny", "--gpus", "1", "2", "--cases", *cases, "--steps", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()
    text = (tmp_path / "scaling-cpu.md").read_text()
    assert "failed" not in text and text.count("| structure DiT |") == 3
    losses = [
        line.split("|")[2:-2] for line in text.splitlines() if line.startswith("| latent DiT 256 |") and "×" in line
    ]
    assert [cells[0].strip() for cells in losses] == ["2 × 1, 1 × 2", "1 × 2, 1 × 2 again"]
    assert all(float(cell) < 1e-5 for cells in losses for cell in cells[1:])
    after_the_death = re.search(r"a run without a death by at most (\S+) of their value", " ".join(text.split()))
    assert after_the_death and float(after_the_death[1]) < 1e-4
    assert "error: rank 0 ends, because another has; the same command continues from the newest checkpoint" in text
    assert "the run went on from step 5." in text or "the run went on from step 10." in text
