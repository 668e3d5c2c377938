"""The plan of a recipe: parameters as built, the measured steps of one H200, and totals that follow from the table."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.training_steps import jobs_in
from d3ds2.networks.image_encoder import ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE
from training import flops, plan
from training.plan import Machine, cost_of, gib_of, main, seconds_of, size_at, tokens_of_picture
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
MEASURED = [  # benchmarks/results: form, whether attention is recomputed too, seconds and GiB of 84,820 tokens
    pytest.param(V11, False, 0.9097, 40.32, id="v1.1"),
    pytest.param(V10, False, 1.2504, 40.04, id="v1.0"),
    pytest.param(V11, True, 1.1445, 15.03, id="v1.1-all-recomputed"),
]
FIRST_STEPS = {  # benchmarks/results/training-h200.md: seconds and GiB of a step on one GPU
    "train_vae_512": (0.117, 8.96),
    "train_vae_1024": (0.140, 4.69),
    "train_structure_vae": (0.292, 22.0),
    "train_structure_dit": (1.43, 51.4),
    "train_dit_256": (0.492, 32.7),
    "train_dit_384": (0.792, 28.5),
    "train_dit_512": (1.56, 47.5),
    "train_dit_1024": (1.10, 50.4),
}


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


@pytest.mark.parametrize(("form", "recompute_all", "seconds", "gib"), MEASURED)
def test_the_estimate_is_near_what_one_h200_measured(form, recompute_all, seconds, gib):
    tokens = 84_820
    size = size_at(1024)._replace(tokens=tokens)
    context = tokens_of_picture(ImageEncoderConfig(), form.sparse_context)
    work = flops.latent_dit(form, size, context).step(recompute=True, keep_attention=not recompute_all)
    trained, activations = plan.build(LatentDiT, form), plan.dit_bytes(form, True, recompute_all) * tokens
    cost = plan.Cost(trained, 0, tokens, activations, dense=work)
    assert seconds_of(cost, Machine.parse("1xH200", 1)) == pytest.approx(seconds, rel=0.1)
    weights_and_gradients = trained * 8 / plan.GIB  # all that was there beside activations
    assert activations / plan.GIB + weights_and_gradients == pytest.approx(gib, rel=0.1)


def test_the_plan_is_near_the_first_steps_of_the_recipe(tmp_path):
    machine, known, costs = Machine.parse("1xH200", 12), {}, {}
    for job in jobs_in(tmp_path, 50, tiny=False):
        costs[job.stage.name] = cost_of(job, machine, known)
    for stage, (seconds, gib) in FIRST_STEPS.items():
        assert seconds_of(costs[stage], machine) == pytest.approx(seconds, rel=0.3), stage
        least = 0.9 if "dit" in stage else 1.0  # of a VAE, never less than it needs
        assert least * gib < gib_of(costs[stage]) < (1.75 if "train_vae" in stage else 1.15) * gib, stage


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
