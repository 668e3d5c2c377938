"""Adapters: they learn, resume, and are merged into the weights exactly; nothing else of the network moves."""

import dataclasses
import sys

import pytest
import torch

from d3ds2.layers.transformer import FeedForward
from d3ds2.networks.latent_dit import LatentDiT
from d3ds2.networks.model_files import load_network
from d3ds2.networks.structure_dit import StructureDiT
from tests.networks.test_dit import problem, randomize
from tests.support.training_chain import Chain, copy_model
from tests.support.training_data import prepared
from training import encode_latents, train_dit, train_structure_dit, train_structure_vae, train_vae
from training.lora import LoRAConfig, add_adapters, merged
from training.run import RunConfig, read_metrics
from training.state import State

pytest.importorskip("peft", reason="peft is not installed")
LORA = LoRAConfig(rank=2, alpha=4)
STAGES = {"structure_dit": train_structure_dit.train, "dit": train_dit.train}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    """A model whose networks are all trained a little."""
    chain = Chain(prepared(tmp_path_factory), tmp_path_factory.mktemp("lora"))
    for name, module in (
        ("structure_vae", train_structure_vae),
        ("structure_dit", train_structure_dit),
        ("vae", train_vae),
        ("latents", None),
        ("dit", train_dit),
    ):
        if module is None:
            encode_latents.main(chain.latents)
        else:
            config = getattr(chain, name)
            module.train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=3)))
    return chain


def adapted(kind: str, targets=LORA.targets):
    """A network with random weights, its adapters random too, and the arguments of its forward pass."""
    model, arguments = problem(kind)
    randomize(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_adapters(model, dataclasses.replace(LORA, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, arguments, before


@pytest.mark.parametrize("kind", ["latent", "structure"])
def test_merged_weights_are_base_plus_adapters_exactly(kind):
    model, arguments, before = adapted(kind)
    network, expected = merged(model), dict(before)
    parameters = dict(model.named_parameters())
    for name in [name for name in parameters if name.endswith("lora_A.default.weight")]:
        a, b = parameters[name], parameters[name.replace("lora_A", "lora_B")]
        expected[name.replace("lora_A.default.", "")] = before[name.replace("lora_A.default.", "")] + (b @ a) * 2
    assert network.state_dict().keys() == before.keys() and len(parameters) > len(before)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    torch.testing.assert_close(network(*arguments), model(*arguments), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["latent", "structure"])
def test_no_layer_reads_the_weights_past_an_adapter(kind, monkeypatch):
    """Kernels that read a weight would miss its adapter; so the adapted and the merged network must agree."""
    monkeypatch.setattr("d3ds2.layers.transformer.SLICE_ROWS", 4)
    model, arguments, before = adapted(kind, (*LORA.targets, "up"))
    with torch.no_grad():
        out, changed = model(*arguments), merged(model)(*arguments)
        plain = problem(kind)[0]
        plain.load_state_dict(before)
        assert not torch.allclose(plain(*arguments), out, atol=1e-2)
    torch.testing.assert_close(out, changed, atol=1e-4, rtol=1e-4)
    assert any(isinstance(module, FeedForward) for module in model.modules())


def test_only_adapters_learn_and_the_start_is_the_network_itself():
    model, arguments = problem("latent")
    expected = randomize(model)(*arguments)
    add_adapters(model, LORA)
    torch.testing.assert_close(model(*arguments), expected)  # B is zero
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}
    same, _ = problem("latent")
    add_adapters(same, LoRAConfig())
    assert merged(same) is same and all(parameter.requires_grad for parameter in same.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_train_resume_and_are_exported(chain, tmp_path, stage):
    copy_model(chain, tmp_path, "structure_vae", "sdf_vae", "image_encoder")
    network = {"dit": "latent_dit", "structure_dit": "structure_dit"}[stage]
    base = getattr(chain, stage)
    base = dataclasses.replace(base, model_dir=str(tmp_path / "model"), lora=LORA)
    if stage == "structure_dit":
        base = dataclasses.replace(base, train_image_encoder=False)
    results = []
    for folder, steps, rate in (("still", 6, 0.0), ("parts", 3, 0.02), ("parts", 6, 0.02), ("whole", 6, 0.02)):
        changes = {"out_dir": str(tmp_path / folder), "steps": steps, "learning_rate": rate, "workers": 0}
        run = dataclasses.replace(base.run, **changes, start_from=chain.model_dir)
        results.append(STAGES[stage](dataclasses.replace(base, run=run)))
    _, _, parts, whole = results
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    still, losses = ([record["loss"] for record in read_metrics(tmp_path / run)] for run in ("still", "whole"))
    assert losses[0] == still[0] and sum(losses[3:]) < sum(still[3:])  # of the same batches, times and noise
    trained = whole if stage == "dit" else whole["structure_dit"]
    start, exported = load_network(chain.model_dir, network), load_network(tmp_path / "model", network)
    moved = {
        name for name, weight in start.state_dict().items() if not torch.equal(weight, exported.state_dict()[name])
    }
    assert moved and all(name.split(".")[-2] in LORA.targets for name in moved)
    for a, b in zip(exported.parameters(), merged(trained).parameters(), strict=True):
        assert torch.equal(a, b.half().float())


@pytest.mark.parametrize("network", [LatentDiT, StructureDiT])
def test_the_checkpoint_optimises_adapters_alone(network, tmp_path):
    kind = "latent" if network is LatentDiT else "structure"
    model, _ = problem(kind)
    total = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, LORA)
    state = State(model, RunConfig(out_dir=str(tmp_path)))
    learned = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
    assert 0 < learned < total / 4


def test_missing_peft_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora\.rank needs peft: pip install"):
        add_adapters(problem("latent")[0], LORA)


@pytest.mark.parametrize("change", [{"rank": -1}, {"targets": ()}])
def test_wrong_settings_are_named(change):
    with pytest.raises(ValueError, match="expected a rank"):
        LoRAConfig(**change)
