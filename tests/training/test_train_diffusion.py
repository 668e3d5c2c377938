"""The chain after the SDF VAE: structure VAE, structure DiT with its encoder, latents, latent DiT.

Each loss falls, a run that was stopped half way ends with the same parameters, and each stage finds the networks that
earlier stages exported.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels import packed_attention
from d3ds2.networks.efficientnet_lite import EfficientNetLite
from d3ds2.networks.model_files import load_network
from d3ds2.networks.structure_dit import StructureDiT
from d3ds2.storage.model_folder import SamplingConfig
from tests.support.training_chain import ENCODER, Chain, assert_equal_parameters, copy_model, resumed
from tests.support.training_data import R, prepared
from training import encode_latents, train_dit, train_structure_dit, train_structure_vae, train_vae
from training.data.datasets import Shapes, Structures
from training.data.latent_views import LatentViews
from training.data.parts import Part
from training.data.shape_batches import active_voxels
from training.data.shape_files import latent_path, list_shapes, load_shape, read_arrays, shape_path
from training.data.views import Views
from training.losses import FlowLossConfig, StructureLossConfig, SurfaceLossConfig
from training.run import read_metrics
from training.run_folder import checkpoints


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """All stages before the latent DiT, trained in order."""
    chain = Chain(prepared(tmp_path_factory), tmp_path_factory.mktemp("chain"))
    train_structure_vae.train(chain.structure_vae)
    train_structure_dit.train(chain.structure_dit)
    train_vae.train(chain.vae)
    encode_latents.main(chain.latents)
    return chain


def losses(config) -> list[float]:
    records = read_metrics(config.run.out_dir)
    assert [record["step"] for record in records] == list(range(1, config.run.steps + 1))
    return [record["loss"] for record in records]


def test_structure_vae_learns(chain):
    fallen = losses(chain.structure_vae)
    assert np.mean(fallen[-5:]) < 0.6 * np.mean(fallen[:5])
    assert read_metrics(chain.structure_vae.run.out_dir)[-1]["iou"] > 0.6


def test_structure_vae_exports_the_scale_of_its_latents(chain):
    vae = load_network(chain.model_dir, "structure_vae")
    names, _ = list_shapes(chain.data_dir, "train", R)
    structures = train_structure_vae.Structures(chain.data_dir, names, R, 8, 0, symmetries=(0, 4))
    mean, logvar = vae.encode(structures[0])
    z = vae.normalize_latents(mean + (0.5 * logvar).exp() * torch.randn(100, *mean.shape))
    assert vae.config.latents_scale != 1
    assert abs(z.mean().item()) < 0.1 and abs(z.std().item() - 1) < 0.1


def test_structure_vae_resumes_exactly(chain, tmp_path):
    assert_equal_parameters(*resumed(train_structure_vae.train, chain.structure_vae, tmp_path))


def test_structure_dit_learns_and_trains_its_encoder(chain):
    fallen = losses(chain.structure_dit)
    assert np.mean(fallen[-10:]) < 0.75 * np.mean(fallen[:10])
    exported = load_network(chain.model_dir, "image_encoder")
    torch.manual_seed(chain.structure_dit.run.seed)
    untrained = train_structure_dit.make_image_encoder(chain.structure_dit)
    weight = "embeddings.patch_embeddings.projection.weight"
    moved = (exported.state_dict()[weight] - untrained.state_dict()[weight]).abs().max()
    assert moved > 1e-3 and exported.config == ENCODER


def test_structure_dit_resumes_exactly(chain, tmp_path):
    copy_model(chain, tmp_path, "structure_vae")
    assert_equal_parameters(*resumed(train_structure_dit.train, chain.structure_dit, tmp_path))


@pytest.mark.parametrize("views_on_device", [False, True])
def test_structure_latents_may_stay_on_the_device_or_be_encoded_in_each_step(chain, tmp_path, views_on_device):
    copy_model(chain, tmp_path, "structure_vae")
    trained = []
    for device_gib in (1.0, 0.0):
        run = dataclasses.replace(chain.structure_dit.run, out_dir=str(tmp_path / str(device_gib)), steps=3)
        config = dataclasses.replace(
            chain.structure_dit,
            model_dir=str(tmp_path / "model"),
            run=run,
            loss=FlowLossConfig(),  # posteriors are sampled
            device_gib=device_gib,
            views_on_device=views_on_device,
        )
        trained.append(train_structure_dit.train(config))
    for a, b in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # equal bit for bit where convolutions are


def test_structure_dit_can_leave_the_encoder_as_it_is(chain, tmp_path):
    copy_model(chain, tmp_path, "structure_vae", "image_encoder")
    run = dataclasses.replace(chain.structure_dit.run, out_dir=str(tmp_path / "run"), steps=2)
    config = dataclasses.replace(
        chain.structure_dit, model_dir=str(tmp_path / "model"), run=run, train_image_encoder=False
    )
    trained = train_structure_dit.train(config)
    assert_equal_parameters(trained["image_encoder"], load_network(chain.model_dir, "image_encoder"))


def test_structure_dit_starts_from_a_trained_encoder(chain, tmp_path):
    copy_model(chain, tmp_path, "structure_vae")
    run = dataclasses.replace(chain.structure_dit.run, out_dir=str(tmp_path / "run"), steps=1, warmup_steps=10**9)
    config = dataclasses.replace(
        chain.structure_dit, model_dir=str(tmp_path / "model"), run=run, pretrained_encoder=chain.model_dir
    )
    trained = train_structure_dit.train(config)["image_encoder"]  # one step at a learning rate of about zero
    for a, b in zip(trained.parameters(), load_network(chain.model_dir, "image_encoder").parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_encoder_stays_as_it_is_from_a_step_on(chain, tmp_path):
    copy_model(chain, tmp_path, "structure_vae")

    def run_to(steps: int, folder: str):
        run = dataclasses.replace(chain.structure_dit.run, out_dir=str(tmp_path / folder), steps=steps)
        return train_structure_dit.train(
            dataclasses.replace(
                chain.structure_dit,
                model_dir=str(tmp_path / "model"),
                run=run,
                image_encoder_steps=4,
                cache_views=False,
            )
        )

    at_4, at_8 = run_to(4, "short"), run_to(8, "long")
    assert_equal_parameters(at_4["image_encoder"], at_8["image_encoder"])
    weights = zip(at_4["structure_dit"].parameters(), at_8["structure_dit"].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)
    run_to(6, "parts")
    resumed_at_8 = run_to(8, "parts")
    assert_equal_parameters(at_8, resumed_at_8)


def test_further_stretch_starts_from_a_model_folder(chain, tmp_path):
    copy_model(chain, tmp_path, "structure_vae")
    run = dataclasses.replace(
        chain.structure_dit.run, out_dir=str(tmp_path / "run"), steps=1, warmup_steps=10**9, start_from=chain.model_dir
    )
    config = dataclasses.replace(chain.structure_dit, model_dir=str(tmp_path / "model"), run=run)
    trained = train_structure_dit.train(config)  # one step at a learning rate of about zero
    for name in ("image_encoder", "structure_dit"):
        for a, b in zip(trained[name].parameters(), load_network(chain.model_dir, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    wide = dataclasses.replace(config.model, hidden_size=64)
    other = dataclasses.replace(config, model=wide, run=dataclasses.replace(run, out_dir=str(tmp_path / "wide")))
    with pytest.raises(ValueError, match=r"structure_dit in .* has other sizes"):
        train_structure_dit.train(other)


def test_structure_dit_learns_from_pictures_on_the_device(chain, tmp_path):
    copy_model(chain, tmp_path, "structure_vae")
    loss = dataclasses.replace(chain.structure_dit.loss, noise_alone=0.3)
    config = dataclasses.replace(chain.structure_dit, views_on_device=True, loss=loss)
    assert_equal_parameters(*resumed(train_structure_dit.train, config, tmp_path))
    run = dataclasses.replace(config.run, out_dir=str(tmp_path / "learns"))
    config = dataclasses.replace(config, model_dir=str(tmp_path / "model"), run=run)
    train_structure_dit.train(config)
    fallen = losses(config)
    assert np.mean(fallen[-10:]) < 0.75 * np.mean(fallen[:10])


def test_a_step_on_device_pictures_waits_for_nothing(chain, monkeypatch):
    """Reading a value makes the host wait for the device, and so does copying a table to it."""
    views = Views(chain.data_dir, list_shapes(chain.data_dir, "train", R)[0], ENCODER.image_size)
    config = dataclasses.replace(chain.structure_dit, views_on_device=True, imperfect_pictures=True)
    structures = Structures(chain.data_dir, views.names, R, 1, 0)
    pictures_of, dataset = train_structure_dit.load_pictures(config, views, structures, False, torch.device("cpu"))
    encoder, model = train_structure_dit.make_image_encoder(config), StructureDiT(config.model)
    part, generator = Part(dataset[0]), torch.Generator().manual_seed(0)
    x_0 = torch.randn(config.batch_size, 2, 2, 2, 2)

    def step():
        tokens = encoder(pictures_of(part, generator).images)
        return train_structure_dit.flow_loss(model, tokens, x_0, config.loss, generator, part).backward()

    step()  # tables are copied once
    monkeypatch.setattr(packed_attention, "_is_ragged", lambda *_: False)  # its tiles are cut on the host
    names = ("tolist", "item", "nonzero", "unique", "bincount", "cpu", "new_tensor", "__bool__", "__int__", "__float__")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"the step calls {name}"))
    for name in ("bincount", "tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, name=name, **__: pytest.fail(f"the step calls torch.{name}"))
    step()


@pytest.mark.parametrize("views_on_device", [pytest.param(False, marks=pytest.mark.long), True])
def test_structure_dit_trains_a_backbone_on_imperfect_pictures(chain, tmp_path, views_on_device):
    """Check that the run resumes exactly, and that it starts from the published file."""
    copy_model(chain, tmp_path, "structure_vae")
    encoder = dataclasses.replace(ENCODER, image_size=32, patch_size=16, backbone="efficientnet_lite0")
    torch.manual_seed(3)
    published = {}
    for name, conv, norm in (trunk := EfficientNetLite(encoder.backbone)).published_names():
        weight = trunk.get_parameter(f"{name}.conv.weight").detach()
        published[f"{conv}.weight"] = weight
        for part, value in (("weight", 0.9), ("bias", 0.1), ("running_mean", 0.05), ("running_var", 0.8)):
            published[f"{norm}.{part}"] = torch.full((len(weight),), value)
    torch.save(published, tmp_path / "published.pth")
    config = dataclasses.replace(
        chain.structure_dit,
        batch_size=4,
        image_encoder=encoder,
        views_on_device=views_on_device,
        imperfect_pictures=True,
        source_weights={"generated": 0.7},
        backbone_weights=str(tmp_path / "published.pth"),
        backbone_rate=1e-3,
    )
    whole, parts = resumed(train_structure_dit.train, config, tmp_path)
    assert_equal_parameters(whole, parts)
    trained = whole["image_encoder"].patches.backbone
    torch.testing.assert_close(trained.stem.conv.weight, published["_conv_stem.weight"], atol=1e-4, rtol=0)
    assert not torch.equal(trained.stem.conv.weight, published["_conv_stem.weight"])
    exported = load_network(tmp_path / "model", "image_encoder").patches.backbone
    torch.testing.assert_close(exported.stem.norm.scale, trained.stem.norm.scale, atol=2e-3, rtol=2e-3)
    no_backbone = dataclasses.replace(config, image_encoder=ENCODER)
    with pytest.raises(ValueError, match=r"expected image_encoder\.backbone beside backbone_weights"):
        train_structure_dit.make_image_encoder(no_backbone)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_blocks_train_as_the_others(chain, tmp_path, monkeypatch, device):
    """Compile with Inductor on a GPU; on a CPU only run the passes before it, because its C++ takes a minute."""
    copy_model(chain, tmp_path, "structure_vae")
    counter = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    configs, models = [], []
    for compiled in (False, True):
        assert not counter.frame_count
        folder = str(tmp_path / f"run_{compiled}")
        changes = {"out_dir": folder, "steps": 2, "compile": compiled, "device": device, "precision": "fp32"}
        run = dataclasses.replace(chain.structure_dit.run, **changes)
        configs.append(dataclasses.replace(chain.structure_dit, model_dir=str(tmp_path / "model"), run=run))
        models.append(train_structure_dit.train(configs[-1]))
    assert counter.frame_count == 2  # the encoder's layer, and one for both blocks
    torch.testing.assert_close(losses(configs[1]), losses(configs[0]), atol=0, rtol=2e-3)
    if device == "cpu":  # on a GPU, TF32 may change the direction of Adam's first steps, which have a size of 5e-3
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert set(models[1].state_dict()) == set(models[0].state_dict())


def test_latents_are_those_of_the_exported_vae(chain):
    vae = load_network(chain.model_dir, "sdf_vae")
    path = shape_path(chain.data_dir, R, "torus")
    shapes = Shapes(chain.data_dir, "train", (R,), 1, 10_000, seed=0)
    names = shapes.names[R]
    step = next(s for s in range(100) if names[shapes.plans[R][s][0]] == "torus")
    expected, _, voxels = vae.encode(*active_voxels(shapes[step]))
    coords, mean = read_arrays(latent_path(chain.data_dir, R, "torus", 0), "coords", "mean")
    assert np.array_equal(coords, voxels.coords[:, 1:].numpy())
    np.testing.assert_allclose(mean, expected.detach().numpy(), atol=2e-2)
    turned, _ = read_arrays(latent_path(chain.data_dir, R, "torus", 1), "coords", "mean")
    assert sorted(map(tuple, turned)) == sorted(map(tuple, load_shape(path, 1)[0]))
    assert latent_path(chain.data_dir, R, "pill", 7).is_file()  # of the second split


def test_scale_of_latents_is_measured(chain):
    vae = load_network(chain.model_dir, "sdf_vae")
    moments = json.loads(latent_path(chain.data_dir, R, "", 0).with_name("moments.json").read_text())
    assert vae.config.latents_scale == moments["latents_scale"] != 1
    assert vae.config.latents_shift == moments["latents_shift"] and len(moments["std_of_channels"]) == 4


def test_latent_batches_are_packed_in_the_order_of_voxels(chain):
    names, tokens = list_shapes(chain.data_dir, "train", R)
    views = Views(chain.data_dir, names, 28)
    dataset = LatentViews(chain.data_dir, R, views, tokens, 4, 2, 10_000, seed=0)
    batch = dataset[3]
    assert Voxels(batch.coords, R // 8, 4).counts == torch.bincount(batch.coords[:, 0]).tolist()
    assert batch.mean.shape == batch.logvar.shape == (len(batch.coords), 4) and batch.images.shape == (4, 4, 28, 28)
    read_each_time = LatentViews(chain.data_dir, R, views, tokens, 4, 2, 10_000, seed=0, cache=False)
    assert all(torch.equal(a, b) for a, b in zip(batch, read_each_time[3], strict=True))
    small = LatentViews(chain.data_dir, R, views, tokens, 4, 2, int(2 * tokens.min()), seed=0)
    assert len(small[0].images) == 2  # one shape, two views
    with pytest.raises(FileNotFoundError, match=r"make them with python -m training\.encode_latents"):
        LatentViews(chain.data_dir, 64, views, tokens, 4, 2, 10_000, seed=0)


def test_dit_learns(chain):
    trained = train_dit.train(chain.dit)
    fallen = losses(chain.dit)
    assert np.mean(fallen[-10:]) < 0.8 * np.mean(fallen[:10])
    exported = load_network(chain.model_dir, "latent_dit")
    for a, b in zip(exported.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b.half().float())


def test_dit_exports_how_to_sample(chain, tmp_path):
    copy_model(chain, tmp_path, "sdf_vae", "image_encoder")
    run = dataclasses.replace(chain.dit.run, out_dir=str(tmp_path / "run"), steps=1)
    sampling = SamplingConfig(sdf_resolution=64, latent_steps=9)
    with pytest.raises(ValueError, match=f"sampling.sdf_resolution {R} as trained, got 64"):
        dataclasses.replace(chain.dit, sampling=sampling)
    object.__setattr__(sampling, "sdf_resolution", R)  # lower than any sampled; the resolution of these tests
    train_dit.train(dataclasses.replace(chain.dit, model_dir=str(tmp_path / "model"), run=run, sampling=sampling))
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["name"] == "model" and settings["sampling"]["latent_steps"] == 9


def test_dit_resumes_exactly(chain, tmp_path):
    copy_model(chain, tmp_path, "sdf_vae", "image_encoder")
    assert_equal_parameters(*resumed(train_dit.train, chain.dit, tmp_path))


def test_time_limit_saves_and_exports(chain, tmp_path):
    run = dataclasses.replace(chain.structure_vae.run, out_dir=str(tmp_path / "run"), max_minutes=1e-6)
    config = dataclasses.replace(chain.structure_vae, model_dir=str(tmp_path / "model"), run=run)
    stopped = train_structure_vae.train(config)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000001"]
    exported = load_network(tmp_path / "model", "structure_vae")
    assert torch.equal(next(exported.parameters()), next(stopped.parameters()).half().float())


def test_dit_learns_to_tell_surplus_blocks(chain, tmp_path):
    model = dataclasses.replace(chain.dit.model, surplus_value=2.0)
    run = dataclasses.replace(chain.dit.run, steps=4)
    imperfect = {"imperfect_structures": True, "imperfect_pictures": True, "predicted_structures": 0.5}
    surface = SurfaceLossConfig(share=0.6)
    config = dataclasses.replace(chain.dit, run=run, model=model, surface=surface, **imperfect)
    copy_model(chain, tmp_path, "sdf_vae", "image_encoder", "structure_dit", "structure_vae")
    with pytest.raises(
        ValueError, match=r"expected predicted_thresholds as \[low, high\] between 0 and 1, got \[0\.4, 0\.1\]"
    ):
        dataclasses.replace(config, predicted_thresholds=(0.4, 0.1))
    with pytest.raises(
        ValueError, match=r"expected model\.surplus_value above 0 or surface\.surplus .*, got 0 and False"
    ):
        dataclasses.replace(config, model=chain.dit.model)
    assert_equal_parameters(*resumed(train_dit.train, config, tmp_path))


def test_dit_learns_that_surplus_blocks_decode_to_nothing(chain, tmp_path):
    run, loss = dataclasses.replace(chain.dit.run, steps=4), dataclasses.replace(chain.dit.loss, noise_alone=1.0)
    imperfect = {"imperfect_structures": True, "predicted_structures": 0.5}
    surface = SurfaceLossConfig(share=0.6, sign=0.2, surplus=True)
    config = dataclasses.replace(chain.dit, run=run, loss=loss, surface=surface, **imperfect)
    copy_model(chain, tmp_path, "sdf_vae", "image_encoder", "structure_dit", "structure_vae")
    with pytest.raises(ValueError, match=r"expected loss\.noise_alone 1 with surface\.surplus, .*, got 0\.5"):
        dataclasses.replace(config, loss=dataclasses.replace(loss, noise_alone=0.5))
    with pytest.raises(ValueError, match=r"and not both, got 2 and True"):
        dataclasses.replace(config, model=dataclasses.replace(chain.dit.model, surplus_value=2.0))
    assert_equal_parameters(*resumed(train_dit.train, config, tmp_path))


def test_structure_dit_learns_what_its_prediction_decodes_to(chain, tmp_path):
    loss = dataclasses.replace(chain.structure_dit.loss, noise_alone=0.6)
    trained = []
    for folder, occupancy in (("with", StructureLossConfig(dice=1.0)), ("without", None)):
        (tmp_path / folder).mkdir()
        copy_model(chain, tmp_path / folder, "structure_vae")
        config = dataclasses.replace(chain.structure_dit, loss=loss, occupancy=occupancy)
        trained += resumed(train_structure_dit.train, config, tmp_path / folder)
    assert_equal_parameters(*trained[:2])
    first = [next(model["structure_dit"].parameters()) for model in trained]
    assert not torch.equal(first[0], first[2])


def test_structure_decoder_learns_with_the_dit(chain, tmp_path):
    loss = dataclasses.replace(chain.structure_dit.loss, noise_alone=0.6)
    config = dataclasses.replace(chain.structure_dit, loss=loss, occupancy=StructureLossConfig(dice=1.0))
    with pytest.raises(ValueError, match=r"needs a table \[occupancy\]"):
        dataclasses.replace(config, train_structure_decoder=True, occupancy=None)
    config = dataclasses.replace(config, train_structure_decoder=True)
    before, trained = load_network(chain.structure_dit.model_dir, "structure_vae"), []
    for name, stops, gib in (("whole", [6], 4.0), ("parts", [3, 6], 4.0), ("not_held", [6], 0.0)):
        (tmp_path / name).mkdir()
        copy_model(chain, tmp_path / name, "structure_vae")
        folder = str(tmp_path / name / "model")
        for stop in stops:
            run = dataclasses.replace(config.run, out_dir=str(tmp_path / name / "run"), steps=stop)
            train_structure_dit.train(dataclasses.replace(config, model_dir=folder, device_gib=gib, run=run))
        trained.append(load_network(folder, "structure_vae"))
    for after in trained:
        assert_equal_parameters(before.encoder, after.encoder)
        assert not torch.equal(before.decoder.out_conv.weight, after.decoder.out_conv.weight)
        assert_equal_parameters(trained[0], after)
