"""Decoding in chunks gives the same voxels and, up to rounding, the same values as in one piece, for any budget."""

import copy

import numpy as np
import pytest
import torch

from d3ds2.geometry.sdf_blocks import SDFBlocks
from d3ds2.geometry.voxels import Voxels
from d3ds2.networks import chunked_decode
from d3ds2.networks.chunked_decode import chunk_boxes, decode_in_chunks, kept_bytes, latent_bytes
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from tests.networks.test_activation_memory import peak
from tests.parity.test_parity_vae import TANH, rows_of, sdf_vae
from tests.support.golden import assert_close, available, golden, over
from tests.support.random_voxels import random_coords

R = 24  # latent resolution


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(3)
    model = SDFVAE(SDFVAEConfig(hidden_size=64, num_heads=2, encoder_depth=1, decoder_depth=2, group_norm_groups=4))
    model.requires_grad_(False).decoder.out_layer.weight.mul_(8)
    return model


def shell(radius, resolution=R):
    """Return the cells (N, 3) that a sphere crosses."""
    axis = torch.arange(resolution) - resolution / 2 + 0.5
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    return ((distance - radius).abs() < 0.9).nonzero()


def shapes():
    line = torch.arange(R)
    everywhere = torch.cartesian_prod(*[torch.arange(8)] * 3)
    corners = torch.cartesian_prod(*[torch.tensor([0, R - 1])] * 3)
    return {
        "sphere": shell(9),
        "touches every face of the grid": torch.cat([shell(11.6), corners]),
        "slab and rod": torch.cat([
            torch.cartesian_prod(line, line[:20], torch.tensor([0])),
            torch.stack([torch.full((R,), 3), torch.full((R,), 5), line], dim=1)[2:],
        ]),
        "solid corner": torch.cat([everywhere, R - 1 - everywhere]),
        "scattered": random_coords([150], R)[:, 1:],
    }  # fmt: skip


def voxels_of(*samples):
    coords = [torch.cat([torch.full((len(xyz), 1), i), xyz], dim=1) for i, xyz in enumerate(samples)]
    return Voxels.sort(torch.cat(coords).unique(dim=0), R, len(samples))[0]


class Calls(list):
    """A callback that records the arguments of its calls."""

    def __call__(self, *call):
        self.append(call)


def budget_for(vae, voxels, latents):
    """Return the budget in bytes that allows chunks of `latents` latents, halo included."""
    size, dtype = vae.config.hidden_size, torch.float32
    return kept_bytes(size, len(voxels), dtype, voxels.device) + 2 * latents * latent_bytes(size, dtype)


@pytest.mark.parametrize("name", shapes())
def test_chunks_give_the_whole(vae, name):
    voxels = voxels_of(shapes()[name])
    latents = torch.randn(len(voxels), 16, generator=torch.Generator().manual_seed(1))
    expected, fine = vae.decode(latents, voxels)
    assert expected.std() > 0.05
    counts = []
    for limit in (len(voxels), max(343, len(voxels) // 3), 343):
        calls = Calls()
        blocks = decode_in_chunks(vae, latents, voxels, budget_for(vae, voxels, limit), on_chunk=calls)
        sdf, found = blocks.to_voxels()
        assert torch.equal(found.coords, fine.coords) and found.resolution == 8 * R  # sorted, each voxel once
        assert (sdf - expected).abs().max() < 2e-5
        assert calls[-1] == (len(voxels), len(voxels)) and [*calls] == sorted(calls)
        counts.append(len(calls))
    assert counts[0] == 1 and counts == sorted(counts) and (counts[2] > 1 or name == "scattered")


def test_a_halo_of_two_is_too_small(vae, monkeypatch):
    voxels = voxels_of(shapes()["solid corner"])
    latents = torch.randn(len(voxels), 16)
    expected = vae.decode(latents, voxels)[0]
    budget = budget_for(vae, voxels, 343)
    assert (decode_in_chunks(vae, latents, voxels, budget).to_voxels()[0] - expected).abs().max() < 2e-5
    monkeypatch.setattr(chunked_decode, "HALO", 2)
    assert (decode_in_chunks(vae, latents, voxels, budget).to_voxels()[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("level", [1, 2])
def test_smaller_margins_are_too_small(vae, monkeypatch, level):
    voxels = voxels_of(shapes()["solid corner"])
    latents = torch.randn(len(voxels), 16)
    expected, budget = vae.decode(latents, voxels)[0], budget_for(vae, voxels, 343)
    margins = list(chunked_decode.MARGINS)
    margins[level] -= 1
    monkeypatch.setattr(chunked_decode, "MARGINS", tuple(margins))
    assert (decode_in_chunks(vae, latents, voxels, budget).to_voxels()[0] - expected).abs().max() > 1e-4


def test_samples_of_a_batch_stay_apart(vae):
    parts = [shapes()["sphere"], shapes()["scattered"][:0], shapes()["slab and rod"]]
    voxels = voxels_of(*parts)
    latents = torch.randn(len(voxels), 16)
    expected, fine = vae.decode(latents, voxels)
    blocks = decode_in_chunks(vae, latents, voxels, budget_for(vae, voxels, 400))
    sdf, found = blocks.to_voxels()
    assert torch.equal(found.coords, fine.coords) and blocks.counts == voxels.counts
    assert (sdf - expected).abs().max() < 2e-5
    for (coords, values), part in zip(blocks.samples(), parts, strict=True):
        assert len(coords) == len(values) == len(part)


def test_slices_of_windows_and_rows_change_nothing(vae, monkeypatch):
    voxels = voxels_of(shapes()["sphere"])
    latents = torch.randn(len(voxels), 16)
    expected = decode_in_chunks(vae, latents, voxels).values
    monkeypatch.setattr(chunked_decode, "MIN_SLICE", 300)
    budget = kept_bytes(64, len(voxels), torch.float32, voxels.device) + 2 * len(voxels) * latent_bytes(
        64, torch.float32
    )
    slices = [*chunked_decode._window_slices(voxels.windows(4, 8), 300)]
    assert len(slices) > 2 and sum(sum(part.lengths) for _, part in slices) == len(voxels)
    actual = decode_in_chunks(vae, latents, voxels, budget).values
    assert (actual - expected).abs().max() < 2e-5


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_budget_is_kept(share):
    model = SDFVAE(SDFVAEConfig(hidden_size=128, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=4))
    voxels = Voxels.sort(torch.nn.functional.pad(shell(18, 48), (1, 0)), 48)[0]
    latents, budget = torch.randn(len(voxels), 16), budget_for(model, voxels, int(share * len(voxels)))
    measured = peak(lambda: decode_in_chunks(model, latents, Voxels(voxels.coords, 48, 1), budget))
    assert 0.3 * budget < measured < budget


def test_boxes_hold_every_latent_once_and_keep_the_limit():
    voxels = voxels_of(shapes()["touches every face of the grid"], shapes()["sphere"])
    coords = voxels.coords.numpy()
    boxes = chunk_boxes(voxels, 500)
    times = np.zeros(len(coords), int)
    for low, high, rows in boxes:
        inside = ((coords >= low) & (coords < high)).all(1)
        reach = ((coords >= low - [0, 3, 3, 3]) & (coords < high + np.array([0, 3, 3, 3]))).all(1)
        assert inside.any() and len(rows) <= 500 and np.array_equal(np.flatnonzero(reach), np.sort(rows.numpy()))
        times += inside
    assert (times == 1).all() and len(boxes) > 4


def test_nothing_to_decode_and_wrong_arguments(vae):
    empty = Voxels(torch.zeros(0, 4, dtype=torch.int32), R, 1)
    assert decode_in_chunks(vae, torch.zeros(0, 16), empty).values.shape == (0, 8, 8, 8)
    voxels = voxels_of(shapes()["sphere"])
    latents = torch.randn(len(voxels), 16)
    with pytest.raises(ValueError, match="expected latents"):
        decode_in_chunks(vae, latents[1:], voxels)
    with pytest.raises(ValueError, match=r"memory budget of at least .* bytes for .* latents, got 1000") as raised:
        decode_in_chunks(vae, latents, voxels, 1000)
    least = int(str(raised.value).split(" bytes")[0].split()[-1])
    decode_in_chunks(vae, latents, voxels, least)


def test_blocks_become_voxels_and_return(vae):
    voxels = voxels_of(shapes()["scattered"], shapes()["sphere"])
    sdf, fine = vae.decode(torch.randn(len(voxels), 16), voxels)
    back, same = SDFBlocks.of_voxels(sdf, fine).to_voxels()
    assert torch.equal(back, sdf) and torch.equal(same.coords, fine.coords) and same.batch_size == 2


@over("sparse_vae*", holding="outputs/mean")
def test_chunks_give_the_official_values(name):
    data, model = sdf_vae(name)
    voxels, order = Voxels.sort(data.inputs["latent_coords"], data.config["resolution"])
    limit = next(n for n in range(len(voxels) // 4, len(voxels)) if chunk_boxes(voxels, n) is not None)
    calls, factor = Calls(), data.meta["factor"]
    blocks = decode_in_chunks(
        model, data.inputs["latents"][order], voxels, budget_for(model, voxels, limit), factor, calls
    )
    assert len(calls) > 1
    sdf, fine = blocks.to_voxels()
    wanted = data.outputs["sdf_coords_every_64"].long()
    assert_close(sdf[rows_of(fine.coords, wanted)], data.outputs["sdf"][::64], TANH)
    for chunked in available(name.replace("sparse_vae", "sparse_vae_chunk")):
        official = golden(chunked)
        assert len(sdf) == official.meta["unique_rows"]
        rows = rows_of(fine.coords, official.outputs["coords_every_16"])
        assert_close(sdf[rows], official.outputs["sdf_every_16"], TANH)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 3e-2)])
def test_gpu_decodes_what_the_cpu_decodes(vae, dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    voxels = voxels_of(shapes()["touches every face of the grid"], shapes()["sphere"])
    latents = torch.randn(len(voxels), 16)
    expected = decode_in_chunks(vae, latents, voxels)
    twin = copy.deepcopy(vae).to("cuda", dtype)
    for limit in (len(voxels), 400):
        budget = kept_bytes(64, len(voxels), dtype, latents.cuda().device) + 2 * limit * latent_bytes(64, dtype)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        actual = decode_in_chunks(twin, latents.cuda(), voxels.to("cuda"), budget)
        assert torch.cuda.max_memory_allocated() - before < budget + (64 << 20)  # slices of rows have a minimum size
        assert torch.equal(actual.coords.cpu(), expected.coords)
        assert (actual.values.cpu() - expected.values).abs().max() < tolerance
