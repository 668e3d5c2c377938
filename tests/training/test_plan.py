"""The plan of a recipe: parameters as built, the measured steps of one H200, and totals that follow from the table."""

import re
from pathlib import Path

import pytest
import torch

from d3ds2.networks.image_encoder import ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE
from training import flops, plan
from training.plan import CONTEXT_GIB, Machine, cost_of, gib_of, main, seconds_of, size_at, tokens_of_picture
from training.recipe import read_recipe

PAPER = str(Path(__file__).parents[2] / "training" / "configs" / "paper")
SMALL = {
    "train_vae": (SDFVAE, ["hidden_size=32", "num_heads=2", "group_norm_groups=2"]),
    "train_structure_vae": (StructureVAE, ["encoder_widths=[8,16]", "decoder_widths=[16,8]"]),
    "train_structure_dit": (StructureDiT, ["hidden_size=32", "depth=2", "num_heads=2"]),
    "train_dit": (LatentDiT, ["hidden_size=64", "depth=2", "num_heads=32"]),
}
V11 = LatentDiTConfig(compression_block=8, pooled_conv=False, sparse_context=False)
V10 = LatentDiTConfig()
MEASURED = [  # benchmarks/results/dit-h200.md: form, tokens, seconds and GiB of a step
    pytest.param(V11, 84_820, 1.2519, 17.46, id="v1.1-84820"),
    pytest.param(V11, 45_904, 0.6674, 11.20, id="v1.1-45904"),
    pytest.param(V11, 131_072, 2.0639, 24.81, id="v1.1-131072"),
    pytest.param(V11, 10_655, 0.289, 6.10, id="v1.1-10655"),
    pytest.param(V10, 84_820, 1.7163, 17.18, id="v1.0-84820"),
    pytest.param(V10, 131_072, 3.1938, 24.39, id="v1.0-131072"),
]


@pytest.mark.parametrize("script", SMALL)
def test_parameters_are_those_of_the_built_networks(script):
    network, sizes = SMALL[script]
    overrides = [f"{script}.model.{size}" for size in sizes]
    jobs = [job for job in read_recipe(PAPER, overrides) if job.stage.script == script]
    built = sum(parameter.numel() for parameter in network(jobs[0].config.model).parameters())
    known = {
        "sdf_vae": read_recipe(PAPER, overrides)[2].config.model,
        "image_encoder": ImageEncoderConfig(28, 14, 16, 1, 2),
    }
    for job in jobs:
        assert cost_of(job, Machine.parse("8xA100", 10), known).trained == built


@pytest.mark.parametrize(("form", "tokens", "seconds", "gib"), MEASURED)
def test_the_estimate_is_near_what_one_h200_measured(form, tokens, seconds, gib):
    size = size_at(1024)._replace(tokens=tokens)
    work = flops.latent_dit(form, size, tokens_of_picture(ImageEncoderConfig(), form.sparse_context)).step(
        recompute=True
    )
    trained = plan.build(LatentDiT, form)
    cost = plan.Cost(
        trained, 0, tokens, plan.dit_bytes(form, True) * tokens, dense=work, least_seconds=plan.DIT_SECONDS
    )
    assert seconds_of(cost, Machine.parse("1xH200", 1)) == pytest.approx(seconds, rel=0.1)
    without_state = (
        gib_of(cost) - CONTEXT_GIB - trained * (plan.STATE_BYTES - 8) / plan.GIB
    )  # there: weights, gradients
    assert without_state == pytest.approx(gib, rel=0.15)


def test_more_gpus_take_less_time_and_memory_each():
    job = next(job for job in read_recipe(PAPER, []) if job.stage.name == "train_dit_512")
    one, eight = (Machine.parse(gpus, 100) for gpus in ("1xA100", "8xA100"))
    costs = [cost_of(job, machine, {}) for machine in (one, eight)]
    assert costs[0].dense == costs[1].dense and costs[0].activations == 8 * costs[1].activations
    assert seconds_of(costs[0], one) == pytest.approx(8 * seconds_of(costs[1], eight))
    assert costs[0].amount == pytest.approx(64 * 10655)


def test_the_table_has_every_stage_and_says_what_does_not_fit(capsys):
    assert main([PAPER, "gpus=2xRTX-4090", "shapes=1000"]) == 0
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == [job.stage.name for job in read_recipe(PAPER, [])]
    days = sum(float(row[7]) for row in rows[2:] if row[7])
    total = re.search(r"all stages: ([\d.,]+) days on the GPUs, ([\d.,]+) GiB on the disk, for 1,000 shapes", output)
    assert total and float(total[1].replace(",", "")) == pytest.approx(days, abs=0.2)
    advice = re.search(r"train_dit_512 does not fit 24 GiB: (train_dit_512.run.accumulate=\d+)", output)
    assert advice
    assert main([PAPER, "gpus=2xRTX-4090", "shapes=1000", advice[1]]) == 0
    assert "train_dit_512 does not fit" not in capsys.readouterr().out


def test_the_page_about_the_paper_shows_what_the_plan_prints(capsys):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert main([PAPER, "gpus=8xA100"]) == 0
    output = capsys.readouterr().out

    def rows(text):
        cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
        return [row for row in cells if set("".join(row)) != {"-"}]

    printed, shown = rows(output), rows(page)
    start = shown.index(printed[0])
    assert shown[start : start + len(printed)] == printed
    total = next(line for line in output.splitlines() if line.startswith("all stages"))
    assert f"A{total[1:]}." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus=8"], "expected gpus=<number>x<kind>, one of"),
        (["gpus=8xT4"], "got '8xT4'"),
        (["run.step=4"], "no stage has the key of run.step=4"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert main([PAPER, *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_nothing_is_built_in_memory(monkeypatch):
    devices, init = set(), torch.nn.Linear.__init__

    def record(self, *arguments, **options):
        init(self, *arguments, **options)
        devices.add(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", record)
    plan.build.cache_clear()
    plan.table([job for job in read_recipe(PAPER, []) if "dit" in job.stage.name], Machine.parse("1xH200", 10))
    assert devices == {"meta"}
    assert plan.build(StructureDiT, StructureDiTConfig()) > 5e8
