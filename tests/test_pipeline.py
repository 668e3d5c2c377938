"""Image -> mesh with random weights: the stages fit together, a seed always gives the same mesh, errors are named."""

import dataclasses

import numpy as np
import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.images.foreground import cut_out, preprocess
from d3ds2.images.image_file import ImageError
from d3ds2.pipeline import STAGES, EmptyResultError, GenerationError, build_pipeline, load_pipeline
from d3ds2.rectified_flow import Sampler
from d3ds2.storage.model_folder import ModelFolderError, SamplingConfig
from tests.support.tiny_model import SAMPLING, draw_object, make_networks, write_model


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline(make_networks(), SAMPLING)


@pytest.fixture(scope="module")
def mesh(pipeline):
    return pipeline.generate(draw_object(), seed=5)


def test_mesh_is_closed_and_oriented(mesh):
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    forward, backward = (np.unique(e, axis=0, return_counts=True) for e in (edges, edges[:, ::-1]))
    assert np.array_equal(forward[0], backward[0]) and np.array_equal(forward[1], backward[1])
    assert mesh.vertices.dtype == np.float32 and np.abs(mesh.vertices).max() <= 1
    assert mesh.normals.shape == mesh.vertices.shape


def test_one_seed_is_one_mesh_bit_for_bit(pipeline, mesh):
    again = pipeline.generate(draw_object(), seed=5)
    for a, b in ((mesh.vertices, again.vertices), (mesh.faces, again.faces), (mesh.normals, again.normals)):
        assert a.tobytes() == b.tobytes()
    assert len(pipeline.generate(draw_object(), seed=2**64 - 1).faces) > 0
    assert pipeline.generate(draw_object(), seed=6).vertices.tobytes() != mesh.vertices.tobytes()


def test_a_saved_model_makes_the_same_mesh(tmp_path, mesh):
    torch.manual_seed(123)  # the state of the global generator must not matter
    loaded = load_pipeline(write_model(tmp_path / "model"))
    assert loaded.generate(draw_object(), seed=5).vertices.tobytes() == mesh.vertices.tobytes()


def test_the_image_changes_the_result(pipeline):
    ball, flipped = draw_object(), draw_object().rotate(180)
    tokens = [pipeline.encode_image([image]) for image in (ball, flipped)]
    v1, v2 = (pipeline.sample_structure(t, [0]) for t in tokens)
    assert not torch.equal(v1.coords, v2.coords)
    l1, l2 = (pipeline.sample_latents(v1, t, [0]) for t in tokens)
    assert (l1 - l2).abs().mean() > 1e-3 * l1.std()


def test_samples_of_a_batch_equal_single_ones(pipeline):
    images, seeds = [draw_object(), draw_object((40, 90))], [3, 4]
    tokens = pipeline.encode_image(images)
    alone = [pipeline.encode_image([image]) for image in images]
    structures = [pipeline.sample_structure(t, [seed]) for t, seed in zip(alone, seeds, strict=True)]
    together = pipeline.sample_structure(tokens, seeds)
    for i, structure in enumerate(structures):
        differs = len({*map(tuple, together.sample(i).coords.tolist())} ^ {*map(tuple, structure.coords.tolist())})
        assert differs <= 2  # the order of a sum may decide about a logit at the threshold

    voxels = Voxels.cat(structures)
    latents = pipeline.sample_latents(voxels, tokens, seeds).split(voxels.counts)
    for i, structure in enumerate(structures):
        expected = pipeline.sample_latents(structure, alone[i], [seeds[i]])
        torch.testing.assert_close(latents[i], expected, atol=1e-3, rtol=1e-3)

    batch = torch.cat(latents)
    meshes = pipeline.blocks_to_meshes(pipeline.decode_blocks(batch, voxels))
    for i, structure in enumerate(structures):
        single = pipeline.blocks_to_meshes(pipeline.decode_blocks(latents[i], structure))[0]
        assert abs(len(meshes[i].faces) - len(single.faces)) <= 0.01 * len(single.faces)


def test_the_two_noises_of_a_seed_differ_and_on_step_may_stop(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.sample_structure(tokens, [0])
    seen = []

    def stop(step, x_t, x_0):
        seen.append(x_t.flatten()[:100])
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pipeline.sample_structure(tokens, [0], 1000, 1.0, stop)
    with pytest.raises(InterruptedError):
        pipeline.sample_latents(voxels, tokens, [0], 1000, 1.0, stop)
    assert torch.corrcoef(torch.stack(seen))[0, 1].abs() < 0.5  # after one of 1000 steps, x_t is still nearly the noise


def test_guidance_and_steps_reach_the_sampler(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.sample_structure(tokens, [0])
    base = pipeline.sample_latents(voxels, tokens, [0])
    assert torch.equal(base, pipeline.sample_latents(voxels, tokens, [0], SAMPLING.latent_steps, 7.0))
    assert not torch.equal(base, pipeline.sample_latents(voxels, tokens, [0], guidance_scale=1.0))
    assert not torch.equal(base, pipeline.sample_latents(voxels, tokens, [0], steps=4))


def test_a_view_given_twice_is_one_view_and_their_order_does_not_matter(pipeline):
    front, side = draw_object(), draw_object().rotate(90)
    views = [pipeline.encode_views([pictures]) for pictures in (front, [front, front], [front, side], [side, front])]
    structures = [pipeline.sample_structure(tokens, [3]) for tokens in views]
    alone, twice, both, turned = [{*map(tuple, structure.coords.tolist())} for structure in structures]
    for one, other in ((alone, twice), (both, turned)):
        assert len(one ^ other) <= 2  # the order of a sum may decide about a logit at the threshold
    assert len(alone ^ both) > 2

    alone, twice, both, turned = [pipeline.sample_latents(structures[0], tokens, [3]) for tokens in views]
    for one, other in ((alone, twice), (both, turned)):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert (alone - both).abs().mean() > 1e-3 * alone.std()


def test_several_views_of_several_objects_make_a_mesh_each(pipeline):
    objects = [[draw_object(), draw_object().rotate(90)], [draw_object((40, 90)), draw_object()]]
    meshes = pipeline.generate_batch(objects, [3, 4])
    alone = pipeline.generate(objects[1], 4)
    assert len(meshes) == 2 and abs(len(meshes[1].faces) - len(alone.faces)) <= 0.01 * len(alone.faces)
    for wrong in ([objects[0], [draw_object()]], [[], []], []):
        with pytest.raises(ValueError, match="equally many views"):
            pipeline.encode_views(wrong)


def test_the_sampler_reaches_both_stages(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    base = pipeline.sample_latents(voxels := pipeline.sample_structure(tokens, [0]), tokens, [0])
    grids = {}
    for name, sampler in {
        "default": Sampler(),
        "interval": Sampler(guidance_interval=(0.0, 0.0)),
        "rescale": Sampler(guidance_rescale=0.7),
        "heun": Sampler("heun"),
        "times": Sampler(times=(1.0, 0.5, 0.0)),
    }.items():
        grids[name] = pipeline.sample_structure(tokens, [0], sampler=sampler)
        latents = pipeline.sample_latents(voxels, tokens, [0], sampler=sampler)
        assert torch.equal(latents, base) == (name == "default")
    assert torch.equal(grids["default"].coords, voxels.coords)
    assert torch.equal(grids["interval"].coords, pipeline.sample_structure(tokens, [0], guidance_scale=1.0).coords)
    calls = []
    two_steps = Sampler(times=(1.0, 0.5, 0.0))
    pipeline.generate(draw_object(), on_progress=lambda *call: calls.append(call), sampler=two_steps)
    assert {call[2] for call in calls if call[0] in ("structure", "latents")} == {2}


def test_latents_are_denormalized_for_the_decoder():
    sampled = {}
    for scale in (0.5, 1.0):
        networks = make_networks(sdf_vae={"latents_scale": scale, "latents_shift": 0.25})
        p = build_pipeline(networks, SAMPLING)
        tokens = p.encode_image([draw_object()])
        sampled[scale] = p.sample_latents(p.sample_structure(tokens, [0]), tokens, [0])
    torch.testing.assert_close((sampled[0.5] - 0.25) * 0.5, sampled[1.0] - 0.25)


def test_progress_reports_every_step(pipeline):
    calls = []
    pipeline.generate(draw_object(), on_progress=lambda *call: calls.append(call), structure_steps=2, latent_steps=4)
    expected = []
    for stage, steps in zip(STAGES, (1, 2, 4, 1, 1), strict=True):
        expected += [(stage, step, steps) for step in range(steps + 1)]
    assert calls == expected


def test_an_empty_structure_is_an_error(pipeline):
    networks = make_networks()
    networks["structure_vae"].decoder.out_conv.bias.fill_(-1e4)
    empty = build_pipeline(networks, SAMPLING)
    with pytest.raises(EmptyResultError, match="structure of image came out empty; try another seed"):
        empty.generate(draw_object())
    with pytest.raises(EmptyResultError, match="structure of image 1 of 2 came out empty"):
        empty.generate_batch([draw_object()] * 2, [0, 1])


def test_an_sdf_without_inside_is_an_error():
    networks = make_networks()
    networks["sdf_vae"].decoder.out_layer.bias.fill_(1e4)
    with pytest.raises(EmptyResultError, match="surface of image came out empty"):
        build_pipeline(networks, SAMPLING).generate(draw_object())


def test_values_that_are_not_finite_are_an_error():
    networks = make_networks()
    networks["sdf_vae"].decoder.out_layer.bias.fill_(float("nan"))
    with pytest.raises(GenerationError, match="not finite on cpu; try float32"):
        build_pipeline(networks, SAMPLING).generate(draw_object())


def test_an_image_without_object_is_an_error(pipeline):
    with pytest.raises(ImageError, match="fully transparent"):
        pipeline.generate(draw_object().point(lambda v: 0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("structure_dit", {"context_size": 32}, "context_size of structure_dit 24, got 32"),
        ("latent_dit", {"context_size": 32}, "context_size of latent_dit 24, got 32"),
        ("structure_dit", {"latent_channels": 8}, "latent_channels of structure_dit 4, got 8"),
        ("latent_dit", {"latent_channels": 8}, "latent_channels of latent_dit 16, got 8"),
        ("structure_dit", {"resolution": 8}, "sdf_resolution 128, got 64"),
    ],
)
def test_networks_that_do_not_fit_are_named(name, change, message):
    with pytest.raises(ModelFolderError, match=message):
        build_pipeline(make_networks(**{name: change}), SAMPLING)


def test_half_precision_runs(tmp_path):
    mesh = load_pipeline(write_model(tmp_path), dtype=torch.bfloat16).generate(draw_object())
    assert len(mesh.faces) > 0


@pytest.mark.parametrize("change", [{"latent_steps": 0}, {"sdf_resolution": 96}, {"structure_shift": 0.0}])
def test_sampling_config_is_checked(change):
    with pytest.raises(ValueError, match="expected"):
        SamplingConfig(**change)


def test_surplus_voxels_are_left_out_before_decoding(pipeline):
    dit = pipeline.stages[0].latent_dit
    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.sample_structure(tokens, [0])
    latents = pipeline.sample_latents(voxels, tokens, [0])
    whole = pipeline.decode_blocks(latents, voxels)
    plain, vae = dit.config, pipeline.stages[0].sdf_vae
    surplus = torch.arange(len(voxels)) % 5 == 0
    value = torch.full_like(latents[:1], 50.0 / vae.config.latents_scale + vae.config.latents_shift)
    marked = torch.where(surplus[:, None], value, latents)
    try:
        dit.config = dataclasses.replace(plain, surplus_value=50.0)
        kept = Voxels(voxels.coords[~surplus], voxels.resolution, 1)
        made, expected = pipeline.decode_blocks(marked, voxels), pipeline.decode_blocks(latents[~surplus], kept)
        assert torch.equal(made.coords, expected.coords) and torch.equal(made.values, expected.values)
        assert torch.equal(pipeline.decode_blocks(latents, voxels).values, whole.values)
        with pytest.raises(EmptyResultError, match="the latents of image came out empty"):
            pipeline.decode_blocks(value.expand_as(latents), voxels)
    finally:
        dit.config = plain


def test_structure_can_be_widened(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    latents = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, wide = pipeline.decode_structure(latents), pipeline.decode_structure(latents, 1)
    steps = torch.tensor([[0, 0, 0], *torch.eye(3).tolist(), *(-torch.eye(3)).tolist()]).int()
    around = (plain.coords[:, None, 1:] + steps).flatten(0, 1)
    around = around[((around >= 0) & (around < plain.resolution)).all(1)].unique(dim=0)
    assert torch.equal(wide.coords[:, 1:].unique(dim=0), around)
    sampling = dataclasses.replace(pipeline.sampling, structure_widening=1)
    widened = dataclasses.replace(pipeline, sampling=sampling).sample_structure(tokens, [0])
    assert len(widened) > len(pipeline.sample_structure(tokens, [0]))


def test_mirrored_pictures_give_mirrored_structures(pipeline):
    sampling = dataclasses.replace(pipeline.sampling, structure_steps=1, structure_mirrored=True)
    both, picture = dataclasses.replace(pipeline, sampling=sampling), draw_object()
    plain, mirrored = both.encode_sides([picture], 1)
    seen = both.sample_structure(plain, [0], mirrored=mirrored)
    expected = both.sample_structure(mirrored, [0], mirrored=plain).coords.clone()
    expected[:, 1] = seen.resolution - 1 - expected[:, 1]
    assert torch.equal(seen.coords, Voxels.sort(expected, seen.resolution, 1)[0].coords)
    assert not torch.equal(seen.coords, both.sample_structure(plain, [0]).coords)
    pixels = preprocess(cut_out(picture), both.image_encoder.config.image_size)[None]
    assert torch.equal(both.image_encoder(pixels.flip(-1)).features, mirrored[0].features)
    several = both.sample_structure(plain, [0], 3, mirrored=mirrored)
    assert torch.equal(several.coords, both.sample_structure(plain, [0], 3).coords)
    assert pipeline.encode_sides([picture], 1)[1] is None and both.encode_sides([picture], 3)[1] is None

    with_both = both.generate(picture, seed=0, latent_steps=1)
    latents = both.sample_latents(seen, plain, [0], 1)
    assert (
        with_both.vertices.tobytes() == both.blocks_to_meshes(both.decode_blocks(latents, seen))[0].vertices.tobytes()
    )


def test_the_surface_is_smoothed_as_the_settings_say(pipeline, mesh):
    sampling = dataclasses.replace(pipeline.sampling, surface_smoothing=2)
    smooth = dataclasses.replace(pipeline, sampling=sampling).generate(draw_object(), seed=5)
    areas = [
        np.linalg.norm(np.cross(*np.diff(m.vertices[m.faces], axis=1).swapaxes(0, 1)), axis=1).sum()
        for m in (mesh, smooth)
    ]
    assert areas[1] < 0.9 * areas[0]  # the surface of random weights is rough
    filled = dataclasses.replace(pipeline, sampling=dataclasses.replace(pipeline.sampling, least_inside=0.6))
    more = filled.generate(draw_object(), seed=5)
    assert more.vertices.tobytes() != mesh.vertices.tobytes()
    again = dataclasses.replace(filled, sampling=dataclasses.replace(filled.sampling, least_inside=0.01))
    assert again.generate(draw_object(), seed=5).vertices.tobytes() == mesh.vertices.tobytes()
    with pytest.raises(ValueError, match=r"least_inside in \[0, 1\), got 1"):
        dataclasses.replace(SAMPLING, least_inside=1)
    with pytest.raises(ValueError, match="surface_smoothing from 0 to 32, got 33"):
        dataclasses.replace(SAMPLING, surface_smoothing=33)


def test_a_threshold_of_the_settings_replaces_that_of_the_network(pipeline):
    latents = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    counts = []
    for threshold in (0.3, None, 0.7):
        sampling = dataclasses.replace(pipeline.sampling, structure_threshold=threshold)
        counts.append(len(dataclasses.replace(pipeline, sampling=sampling).decode_structure(latents)))
    assert counts[0] > counts[1] > counts[2] and 0.3 < pipeline.structure_vae.config.threshold < 0.7
    with pytest.raises(ValueError, match=r"structure_threshold in \(0, 1\), got 1"):
        dataclasses.replace(SAMPLING, structure_threshold=1.0)
