"""The flow, its schedule, its training times, noise and sampler, on problems with a known answer."""

import math
from dataclasses import replace

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.rectified_flow import (
    Sampler,
    euler_sample,
    guided_velocity,
    interpolate,
    mean_velocity,
    noise_for,
    rescaled,
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


@pytest.mark.parametrize(
    ("steps", "shift"), [(0, 1.0), (5, 0.0), (-1, 1.0), (10**12, 1.0), (2**64, 1.0), (5, math.inf), (5, math.nan)]
)
def test_wrong_schedules_are_named(steps, shift):
    with pytest.raises(ValueError, match="expected 1 to 10000 steps and a positive shift"):
        time_schedule(steps, shift)


@pytest.mark.parametrize("guidance_scale", [math.nan, math.inf, -math.inf, 1e30, 10**400])
def test_guidance_out_of_range_is_named(guidance_scale):
    with pytest.raises(ValueError, match="expected a guidance_scale up to 1000, got"):
        guided_velocity(None, None, guidance_scale)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_seeds_out_of_range_are_named(seed):
    with pytest.raises(ValueError, match="expected seeds of 64 bits"):
        noise_for([0, seed], [(1, 2)] * 2)


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


@pytest.mark.parametrize("kind", ["latent", "structure"])
def test_a_view_given_twice_is_one_view_and_the_order_of_views_does_not_matter(kind):
    model, x_t, voxels, tokens = make_model(kind)
    other = replace(tokens, features=torch.randn_like(tokens.features))
    alone, twice, both, turned = (
        mean_velocity(model, views, 3.5, voxels=voxels)(x_t, 0.4)
        for views in ([tokens], [tokens] * 2, [tokens, other], [other, tokens])
    )
    torch.testing.assert_close(twice, alone)
    torch.testing.assert_close(both, turned)
    torch.testing.assert_close(both, (alone + guided_velocity(model, other, 3.5, voxels)(x_t, 0.4)) / 2)
    assert not torch.allclose(both, alone, atol=1e-3)


@pytest.mark.parametrize("kind", ["latent", "structure"])
@pytest.mark.parametrize("together", [True, False])
def test_outside_the_guidance_interval_only_the_conditional_branch_is_evaluated(kind, together):
    model, x_t, voxels, tokens = make_model(kind)
    samples = []
    model.register_forward_pre_hook(lambda _model, arguments: samples.append(arguments[-1].batch_size))
    velocity = guided_velocity(model, tokens, 3.5, voxels, together, sampler=Sampler(guidance_interval=(0.3, 0.6)))
    always = guided_velocity(model, tokens, 3.5, voxels, together)
    never = guided_velocity(model, tokens, 1.0, voxels, together)
    for t, reference, expected in ((0.2, never, 1), (0.3, always, 2), (0.6, always, 2), (0.61, never, 1)):
        samples.clear()
        found = velocity(x_t, t)
        assert sum(samples) == expected
        assert found.equal(reference(x_t, t))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["latent", "structure"])
def test_rescaled_guidance_has_the_spread_of_the_conditional_branch(kind):
    model, x_t, voxels, tokens = make_model(kind)
    t = 0.7

    def x_0(scale, amount):
        sampler = Sampler(guidance_rescale=amount)
        return x_t - t * guided_velocity(model, tokens, scale, voxels, sampler=sampler)(x_t, t)

    conditional, guided = x_0(1.0, 0.0), x_0(6.0, 0.0)
    assert not math.isclose(guided.std().item(), conditional.std().item(), rel_tol=1e-3)
    rescaled_x_0 = x_0(6.0, 1.0)
    torch.testing.assert_close(rescaled_x_0.std(), conditional.std())
    torch.testing.assert_close(rescaled_x_0 / rescaled_x_0.std(), guided / guided.std(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x_0(6.0, 0.5), (rescaled_x_0 + guided) / 2, atol=1e-4, rtol=1e-4)
    at_the_end = [
        guided_velocity(model, tokens, 6.0, voxels, sampler=Sampler(guidance_rescale=amount))(x_t, 0.0)
        for amount in (0.0, 1.0)
    ]
    assert at_the_end[0].equal(at_the_end[1])


def test_samples_are_rescaled_on_their_own():
    x, guided, conditional = torch.randn(3, 7, 4).unbind()
    together = rescaled(guided, conditional, x, 0.5, [3, 4], 0.7)
    parts = [rescaled(guided[p], conditional[p], x[p], 0.5, [n], 0.7) for p, n in ((slice(3), 3), (slice(3, 7), 4))]
    assert together.equal(torch.cat(parts))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_of_a_sampler_falls_with_its_order(method, order):
    """dx/dt = x has the solution x(0) = x(1) / e."""
    errors, calls = [], []
    for steps in (40, 80):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = euler_sample(lambda x, t: (calls.append(t), x)[1], torch.ones(1).double(), times, method=method)
        errors.append(abs(end.item() - math.exp(-1)))
    # the last step of Heun's method is Euler's: one step of an error of the second order
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert len(calls) == (40 + 80 if method == "euler" else 79 + 159) and 0 not in calls


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "rk4"}, "euler, heun"),
        ({"guidance_interval": (0.6, 0.4)}, "0.6 and 0.4"),
        ({"guidance_interval": (math.nan, 1.0)}, "nan"),
        ({"guidance_rescale": 1.5}, "1.5"),
        ({"times": (0.9, 0.5, 0.0)}, "fall from 1 to 0"),
        ({"times": (1.0, 0.5, 0.5, 0.0)}, "fall from 1 to 0"),
        ({"times": (1.0,)}, "fall from 1 to 0"),
        ({"times": (1.0, math.nan, 0.0)}, "fall from 1 to 0"),
    ],
)
def test_samplers_that_cannot_be_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**values)


def test_a_sampler_brings_its_own_times():
    assert Sampler().steps(9) == 9 and Sampler().schedule(9, 3.0).equal(time_schedule(9, 3.0))
    own = Sampler(times=(1.0, 0.25, 0.0))
    assert own.steps(9) == 2 and own.schedule(9, 3.0).tolist() == [1.0, 0.25, 0.0]


@pytest.mark.parametrize("times", [(1.0,), (1.0, math.nan, 0.0), tuple(1 - i / 20_000 for i in range(20_001))])
def test_times_that_are_too_many_or_not_finite_are_named(times):
    with pytest.raises(ValueError, match="expected up to 10001 times that fall from 1 to 0, got") as raised:
        Sampler(times=times)
    assert len(str(raised.value)) < 150
