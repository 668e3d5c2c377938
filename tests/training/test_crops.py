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
from training.distributed import Ranks
from training.losses import SDFLossConfig
from training.train_vae import count_terms, targets_of, vae_loss

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
    chosen = whole._replace(sdf=whole.sdf[crop.blocks], sharp=whole.sharp[crop.blocks])
    torch.manual_seed(0)
    model = SDFVAE(MODEL)
    results = []
    for batch in (cut, whole):
        model.zero_grad()
        generator = torch.Generator().manual_seed(3)
        if batch is cut:
            terms = vae_loss(model, batch, LOSS, generator)
        else:  # decode everything, then take the blocks
            decode = model.decode
            model.decode = lambda *a, part=None, **k: (
                decode(*a, **k)[0].unflatten(0, (-1, 512))[crop.blocks].flatten(0, 1),
                None,
            )
            terms = vae_loss(
                model, batch._replace(crop=crop._replace(decoded=torch.arange(len(crop.blocks)))), LOSS, generator
            )
            del model.decode
        terms["loss"].backward()
        results.append((terms, [p.grad.clone() for p in model.parameters()]))
    (ours, grads), (expected, expected_grads) = results
    for name, term in expected.items():
        torch.testing.assert_close(ours[name], term, msg=name)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(targets_of(cut)[0], chosen.sdf)
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
        found += [
            (int(s), *row[1:])
            for s, row in zip(samples, part.batch.block_coords[part.batch.crop.blocks].tolist(), strict=True)
        ]
    assert sorted(found) == [tuple(row) for row in whole.block_coords[whole.crop.blocks].tolist()]


def test_a_run_with_cubes_learns(data, tmp_path):
    from training.run import RunConfig, read_metrics
    from training.train_vae import TrainVAEConfig, train

    run = RunConfig(str(tmp_path / "run"), steps=6, log_every=1, device="cpu", tensorboard=False, learning_rate=3e-3)
    config = TrainVAEConfig(
        data,
        str(tmp_path / "model"),
        resolutions=(R,),
        batch_size=3,
        crop=2,
        crop_margin=3,
        run=run,
        model=MODEL,
        fine=True,
    )
    train(config)
    losses = [record["loss"] for record in read_metrics(run.out_dir)]
    assert losses[-1] < losses[0]
    again = dataclasses.replace(
        config, run=dataclasses.replace(run, start_from=config.model_dir, out_dir=str(tmp_path / "2"))
    )
    train(again)
    assert read_metrics(again.run.out_dir)[0]["loss"] < losses[0]
