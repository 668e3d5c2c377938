"""The SDF VAE upsamples a cube of each shape; what counts in the loss is as with the whole shape."""

import dataclasses

import numpy as np
import pytest
import torch

from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from tests.support.training_data import R, prepared
from training.data.crops import draw_crop
from training.data.datasets import Shapes
from training.data.parts import Parts
from training.data.shape_batches import active_voxels
from training.distributed import Ranks
from training.losses import SDFLossConfig, sdf_loss
from training.run import RunConfig, read_metrics
from training.train_vae import TrainVAEConfig, count_terms, targets_of, train, vae_loss

MODEL = SDFVAEConfig(
    latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=2
)
LOSS = SDFLossConfig(sign=1.0)


@pytest.fixture
def data(tmp_path_factory) -> str:
    return prepared(tmp_path_factory)


def shapes(data: str, crop: tuple[int, int] | None) -> Shapes:
    return Shapes(data, "train", (R,), 3, 10**6, 0, (0, 5), crop)


@pytest.mark.parametrize("edge", [1, 2, 3])
def test_the_loss_of_a_cube_is_that_of_its_blocks_when_the_whole_shape_is_decoded(data, edge):
    whole, cut = shapes(data, None)[1], shapes(data, (edge, 3))[1]
    crop = cut.crop
    assert 0 < len(crop.blocks) < len(whole.block_coords) and len(crop.voxels) >= len(crop.blocks)
    torch.manual_seed(0)
    model = SDFVAE(MODEL)
    ours = vae_loss(model, cut, LOSS, torch.Generator().manual_seed(3))
    ours["loss"].backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    mean, logvar, voxels = model.encode(*active_voxels(whole))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    decoded = model.decode(mean + (0.5 * logvar).exp() * noise, voxels)[0].view(-1, 512)[crop.blocks]
    expected = sdf_loss(decoded, whole.sdf[crop.blocks], whole.sharp[crop.blocks], mean, logvar, LOSS)
    expected["loss"].backward()
    expected_grads = [p.grad for p in model.parameters()]
    for name, term in expected.items():
        torch.testing.assert_close(ours[name], term, msg=name)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(targets_of(cut)[0], whole.sdf[crop.blocks])
    assert count_terms(cut).tolist()[3:] == [512 * len(crop.blocks), len(whole.block_coords)]


def test_a_cube_lies_in_the_grid_around_a_latent_of_its_shape(data):
    batch = shapes(data, None)[0]
    lows = set()
    for seed in range(30):
        rngs = [np.random.default_rng([seed, sample]) for sample in range(3)]
        crop = draw_crop(batch.block_coords, batch.latent_voxels, 2, 1, rngs)
        inside = batch.block_coords[crop.blocks]
        for sample in range(3):
            own = inside[inside[:, 0] == sample, 1:]
            assert len(own) and (own.amax(0) - own.amin(0) < 2).all()
            lows.add((sample, *own.amin(0).tolist()))
        assert torch.equal(batch.latent_voxels.coords[crop.rows], crop.voxels.coords)
        decoded = sorted(map(tuple, crop.voxels.coords.tolist()))  # blocks are decoded in this order
        assert [decoded[i] for i in crop.decoded] == [tuple(row) for row in inside.tolist()]
    assert len(lows) > 20


def test_a_cube_as_large_as_the_grid_is_the_whole_shape(data):
    batch = shapes(data, (R // 8, 0))[0]
    assert torch.equal(batch.crop.blocks, torch.arange(len(batch.block_coords)))
    assert torch.equal(batch.crop.voxels.coords, batch.latent_voxels.coords)


def test_parts_of_a_batch_take_the_same_cubes_as_the_whole(data):
    whole = shapes(data, (2, 1))[4]
    found = []
    for rank in range(2):
        part = Parts(shapes(data, (2, 1)), Ranks(torch.device("cpu"), rank, 2), 1)[4]
        samples = part.cut.samples[part.batch.block_coords[part.batch.crop.blocks][:, 0].long()]
        blocks = part.batch.block_coords[part.batch.crop.blocks].tolist()
        found += [(int(sample), *row[1:]) for sample, row in zip(samples, blocks, strict=True)]
    assert sorted(found) == [tuple(row) for row in whole.block_coords[whole.crop.blocks].tolist()]


def test_a_run_with_cubes_learns(data, tmp_path):
    run = RunConfig(str(tmp_path / "run"), steps=6, log_every=1, device="cpu", tensorboard=False, learning_rate=3e-3)
    model_dir, crop = str(tmp_path / "model"), {"crop": 2, "crop_margin": 3}
    config = TrainVAEConfig(data, model_dir, resolutions=(R,), batch_size=3, run=run, model=MODEL, fine=True, **crop)
    train(config)
    losses = [record["loss"] for record in read_metrics(run.out_dir)]
    assert losses[-1] < losses[0]
    run = dataclasses.replace(run, start_from=model_dir, out_dir=str(tmp_path / "2"))
    train(dataclasses.replace(config, run=run))
    assert read_metrics(run.out_dir)[0]["loss"] < losses[0]
