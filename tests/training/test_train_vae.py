"""The SDF VAE's training: the loss falls, and a killed run continues to the same parameters."""

import dataclasses
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels import packed_attention
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from tests.support.train_vae_and_die import dying
from tests.support.training_data import COARSE, R, prepared
from training import loop
from training.data.datasets import Shapes
from training.data.latent_moments import LatentMoments, set_latent_scale
from training.data.loading import to_device
from training.data.shape_batches import active_voxels
from training.losses import SDFLossConfig
from training.run import RunConfig, read_metrics
from training.run_folder import checkpoints
from training.train_vae import TrainVAEConfig, train, vae_loss

ROOT = Path(__file__).resolve().parents[2]
MODEL = SDFVAEConfig(
    latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=2,
    position_resolution=R,
)  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepared(tmp_path_factory)


def make_config(data_dir: str, folder: Path, **run) -> TrainVAEConfig:
    defaults = {"steps": 48, "learning_rate": 5e-3, "warmup_steps": 5, "log_every": 1, "tensorboard": False}
    return TrainVAEConfig(
        data_dir=data_dir,
        model_dir=str(folder / "model"),
        resolutions=(R,),
        batch_size=2,
        symmetries=(0,),
        model=MODEL,
        run=RunConfig(out_dir=str(folder / "run"), device="cpu", **(defaults | run)),
    )


def test_loss_falls_and_the_average_is_exported(data_dir, tmp_path):
    config = make_config(data_dir, tmp_path, ema_decay=0.9)
    ema = train(config)
    losses = [record["loss"] for record in read_metrics(config.run.out_dir)]
    assert len(losses) == 48
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    exported = load_network(config.model_dir, "sdf_vae")
    for a, b in zip(exported.parameters(), ema.parameters(), strict=True):
        assert torch.equal(a, b.half().float())


def test_encoder_input_and_decoder_output_are_the_blocks_of_the_batch(data_dir):
    batch = Shapes(data_dir, "train", (R,), batch_size=2, max_tokens=10_000, seed=0)[0]
    sdf, voxels = active_voxels(batch)
    assert batch.batch_size == 2 and torch.equal(voxels.block_coords, batch.block_coords)
    place = voxels.coords[:, 1:].long() % 8
    assert torch.equal(batch.sdf[voxels.block_of_token, *place.T].float(), sdf[:, 0])
    assert len(sdf) == (batch.sdf.abs() < 1).sum()


def test_grids_of_a_batch_are_those_that_the_voxels_themselves_give(data_dir):
    batch = Shapes(data_dir, "train", (R,), batch_size=2, max_tokens=10_000, seed=0)[0]
    known = active_voxels(batch)[1]
    found = Voxels(known.coords, R, 2)  # computes its tables itself
    for _ in range(3):
        assert torch.equal(known.coords, found.coords) and known.counts == found.counts
        assert torch.equal(known.cu_seqlens, found.cu_seqlens)
        assert torch.equal(known.coarse_counts(2), found.coarse_counts(2))
        (known, parent), (found, expected) = known.coarsen(2), found.coarsen(2)
        assert torch.equal(parent, expected)
    assert known is batch.latent_voxels and torch.equal(known.coords, found.coords)
    again = to_device(batch, torch.device("cpu")).latent_voxels
    for voxels in (known, again):
        assert torch.equal(voxels.neighbors, found.neighbors) and voxels.counts == found.counts
        for shift in (0, 4):
            windows, expected = voxels.windows(shift), found.windows(shift)
            assert windows.lengths == expected.lengths and torch.equal(windows.cu_seqlens, expected.cu_seqlens)
            assert windows.order is expected.order is None or torch.equal(windows.inverse, expected.inverse)


def test_step_asks_the_device_for_nothing(data_dir, monkeypatch):
    """Reading a value makes the host wait, and so does a tensor whose size depends on values."""
    batch = Shapes(data_dir, "train", (R,), batch_size=2, max_tokens=10_000, seed=0)[0]
    model, generator = SDFVAE(MODEL), torch.Generator().manual_seed(0)
    # on a GPU one kernel attends; without it, tiles are cut on the host, from lengths that it knows
    monkeypatch.setattr(packed_attention, "_is_ragged", lambda *_: False)
    names = ("tolist", "item", "nonzero", "unique", "unique_consecutive", "bincount", "cpu", "new_tensor")
    for name in (*names, "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"the step calls {name}"))
    monkeypatch.setattr(torch, "bincount", lambda *_, **__: pytest.fail("the step calls bincount"))
    vae_loss(model, batch, SDFLossConfig(), generator)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_killed_run_continues_to_equal_parameters(data_dir, tmp_path, monkeypatch):
    whole = train(make_config(data_dir, tmp_path / "whole", steps=12, save_every=4))

    config = make_config(data_dir, tmp_path / "killed", steps=12, save_every=4)

    def die_after_step_10() -> None:
        loop.Log = dying(loop.Log, 0, 10)
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, workers=1)))

    monkeypatch.setenv("RANK", "0")
    killed = multiprocessing.get_context("fork").Process(target=die_after_step_10)
    killed.start()
    monkeypatch.undo()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    names = [path.name for path in checkpoints(config.run.out_dir)]
    assert names in (["step_00000004"], ["step_00000008", "step_00000004"])  # the newest may have been in the making
    assert [record["step"] for record in read_metrics(config.run.out_dir)] == list(range(1, 11))

    resumed = train(config)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [record["step"] for record in read_metrics(config.run.out_dir)] == list(range(1, 13))


def test_every_step_draws_a_resolution(data_dir, tmp_path):
    config = dataclasses.replace(make_config(data_dir, tmp_path, steps=8), resolutions=(COARSE, R), batch_size=1)
    shapes = Shapes(data_dir, "train", config.resolutions, 1, config.max_tokens, config.run.seed, config.symmetries)
    drawn = [shapes[step] for step in range(8)]
    assert {batch.resolution for batch in drawn} == {COARSE, R}
    assert all(batch.block_coords[:, 1:].max() < batch.resolution // 8 for batch in drawn)
    train(config)
    trained = [record["tokens"] for record in read_metrics(config.run.out_dir)]
    assert trained == [len(batch.block_coords) for batch in drawn]


def test_resolution_that_was_not_prepared_is_named(data_dir, tmp_path):
    config = dataclasses.replace(make_config(data_dir, tmp_path), resolutions=(R, 2 * R))
    with pytest.raises(ValueError, match=f"resolution {2 * R}"):
        train(config)


def test_decoder_alone_goes_on_from_a_model_folder(data_dir, tmp_path):
    first = make_config(data_dir, tmp_path, steps=4)
    train(first)
    model = load_network(first.model_dir, "sdf_vae")
    set_latent_scale(model, measured(mean=0.5, std=2.0))
    save_network(first.model_dir, "sdf_vae", model)
    further = make_config(data_dir, tmp_path / "further", steps=4, start_from=first.model_dir, ema_decay=0.0)
    train(dataclasses.replace(further, freeze_encoder=True))
    before, after = load_network(first.model_dir, "sdf_vae"), load_network(further.model_dir, "sdf_vae")
    assert after.config == before.config and after.config.latents_scale == pytest.approx(0.5)
    same = {name: torch.equal(p, after.state_dict()[name]) for name, p in before.state_dict().items()}
    assert {name.split(".")[0] for name, equal in same.items() if equal} >= {"encoder"}
    assert not any(equal for name, equal in same.items() if name.startswith("decoder.out_layer"))
    assert all(equal for name, equal in same.items() if name.startswith("encoder"))


def measured(mean: float, std: float) -> LatentMoments:
    moments = LatentMoments(MODEL.latent_channels, torch.device("cpu"))
    z = torch.tensor([[-1.0], [1.0]]).expand(2, MODEL.latent_channels)
    moments.add(mean + std * z, torch.full_like(z, -100.0))
    return moments


def test_decoder_alone_needs_an_encoder(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"freeze_encoder needs run\.start_from"):
        dataclasses.replace(make_config(data_dir, tmp_path), freeze_encoder=True)
