"""The flow, its schedule, its training times, noise and sampler, on problems with a known answer."""

import math

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.rectified_flow import (
    euler_sample,
    guided_velocity,
    interpolate,
    noise_for,
    sample_t,
    time_schedule,
    velocity_target,
)


@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 15])
def test_schedule_falls_from_noise_to_data(steps, shift):
    times = time_schedule(steps, shift)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


def test_schedule_without_shift_is_even():
    assert torch.allclose(time_schedule(4, 1.0)[:-1], torch.linspace(1, 1e-3, 4, dtype=torch.float64))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (5, 0.0)])
def test_wrong_schedules_are_named(steps, shift):
    with pytest.raises(ValueError, match="at least 1 step"):
        time_schedule(steps, shift)


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_follows_straight_paths_exactly(steps):
    x_0, noise = torch.randn(5, 3), torch.randn(5, 3)
    seen = []
    out = euler_sample(
        lambda _x, _t: velocity_target(x_0, noise), noise, time_schedule(steps, 6.0), lambda *step: seen.append(step)
    )
    torch.testing.assert_close(out, x_0)
    assert [i for i, _, _ in seen] == list(range(steps)) and seen[-1][1].equal(out)
    for _, _, estimate in seen:
        torch.testing.assert_close(estimate, x_0)


def test_euler_visits_the_interpolation():
    x_0, noise, times = torch.randn(4), torch.randn(4), time_schedule(5, 3.0)

    def velocity(x_t, t):
        torch.testing.assert_close(x_t, interpolate(x_0, noise, torch.tensor(t, dtype=torch.float32)))
        return velocity_target(x_0, noise)

    euler_sample(velocity, noise, times)


def test_on_step_can_stop_the_sampler():
    def stop(step, _x, _x_0):
        if step == 2:
            raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        euler_sample(lambda x, t: (calls.append(t), x)[1], torch.zeros(2), time_schedule(9, 1.0), stop)
    assert len(calls) == 3


def test_training_times_are_logit_normal():
    t = sample_t(20000, torch.Generator().manual_seed(0), mean=1.0, std=0.5)
    logits = torch.logit(t)
    assert t.shape == (20000,) and t.min() > 0 and t.max() < 1
    assert math.isclose(logits.mean().item(), 1.0, abs_tol=0.02) and math.isclose(
        logits.std().item(), 0.5, abs_tol=0.02
    )
    assert t.equal(sample_t(20000, torch.Generator().manual_seed(0), mean=1.0, std=0.5))


def test_noise_belongs_to_its_seed():
    both = noise_for([3, 2**64 - 1], [(5, 4), (7, 4)])
    assert both.shape == (12, 4)
    assert both[:5].equal(noise_for([3], [(5, 4)])) and both[5:].equal(noise_for([2**64 - 1], [(7, 4)]))
    assert not both[5:10].equal(noise_for([3], [(5, 4)]))
    with pytest.raises(ValueError, match="a seed for each sample"):
        noise_for([1], [(2, 2), (2, 2)])


def make_model(kind):
    torch.manual_seed(0)
    features, coords = torch.randn(6, 12), torch.tensor([[0, i, 0, 0] for i in range(6)], dtype=torch.int32)
    tokens = ImageTokens(features, coords, torch.ones(6, dtype=torch.bool), 1)
    if kind == "latent":
        sizes = {"latent_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 1}
        model, voxels = (
            LatentDiT(LatentDiTConfig(**sizes, context_size=12, top_k=1)),
            Voxels.sort(torch.nn.functional.pad(torch.randint(0, 16, (30, 3)).unique(dim=0), (1, 0)), 16)[0],
        )
        x_t = torch.randn(len(voxels), 4)
    else:
        model = StructureDiT(
            StructureDiTConfig(resolution=2, latent_channels=3, hidden_size=16, depth=1, num_heads=2, context_size=12)
        )
        voxels, x_t = None, torch.randn(1, 3, 2, 2, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, x_t, voxels, tokens


@pytest.mark.parametrize("kind", ["latent", "structure"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_guidance_is_one_batch_of_both_branches(kind, guidance_scale):
    model, x_t, voxels, tokens = make_model(kind)
    calls = []
    model.register_forward_pre_hook(lambda _model, arguments: calls.append(arguments))
    velocity = guided_velocity(model, tokens, guidance_scale, voxels)(x_t, 0.4)
    assert len(calls) == 1

    geometry = () if voxels is None else (voxels,)
    conditional = model(x_t, torch.tensor([0.4]), *geometry, tokens)
    unconditional = model(x_t, torch.tensor([0.4]), *geometry, tokens.zeroed())
    expected = unconditional + guidance_scale * (conditional - unconditional)
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)
