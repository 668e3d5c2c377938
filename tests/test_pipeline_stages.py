"""A tiny released model with two stages: converted, loaded and run, with and without refiners."""

import dataclasses

import numpy as np
import pytest
import torch

from d3ds2.__main__ import main
from d3ds2.geometry.sdf_blocks import SDFBlocks
from d3ds2.meshes.mesh_to_sdf import normalize_mesh
from d3ds2.meshes.mesh_to_structure import mesh_to_structure
from d3ds2.meshes.sdf_to_mesh import sdf_to_mesh
from d3ds2.networks.model_files import load_model
from d3ds2.official.convert import convert
from d3ds2.offload import on_device
from d3ds2.pipeline import FINE_STAGES, STAGES, build_pipeline, load_pipeline
from d3ds2.rectified_flow import guided_velocity, time_schedule
from d3ds2.storage.model_folder import ModelFolderError
from tests.support.official_release import write_release
from tests.support.tiny_model import draw_object

STEPS = {"structure_steps": 2, "latent_steps": 2, "fine_steps": 2}


def converted(folder, version):
    write_release(folder / "release", version)
    convert(folder / "release", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("v1.0"), "v1.0")


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


def assert_closed(mesh):
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    forward, backward = (np.unique(e, axis=0, return_counts=True) for e in (edges, edges[:, ::-1]))
    assert len(mesh.faces) > 0 and np.array_equal(forward[0], backward[0]) and np.array_equal(forward[1], backward[1])


def test_both_stages_run_with_the_models_own_steps(pipeline):
    calls = []
    mesh = pipeline.generate(draw_object(), 3, lambda *call: calls.append(call))
    assert_closed(mesh)
    expected = [(stage, steps) for stage, steps in zip(STAGES, (1, 50, 30, 1, 1), strict=True)]
    expected += [(stage, steps) for stage, steps in zip(FINE_STAGES, (1, 15, 1, 1), strict=True)]
    assert calls == [(stage, step, steps) for stage, steps in expected for step in range(steps + 1)]


def test_the_other_version_runs(tmp_path):
    pipeline = load_pipeline(converted(tmp_path, "v1.1"))
    assert not pipeline.stages[1].latent_dit.config.sparse_context
    assert_closed(pipeline.generate(draw_object(), 3, **STEPS))


def test_generate_runs_the_stages_in_turn(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.sample_structure(tokens, [4], 2)
    latents = pipeline.sample_latents(voxels, tokens, [4], 2)
    assert voxels.resolution == 8 and pipeline.stage_of(voxels) is pipeline.stages[0]
    coarse = pipeline.blocks_to_meshes(pipeline.decode_blocks(latents, voxels))
    alone = pipeline.generate(draw_object(), 4, fine=False, **STEPS)
    assert coarse[0].vertices.tobytes() == alone.vertices.tobytes()

    fine_voxels = pipeline.structure_of(coarse)
    assert fine_voxels.resolution == 16 and pipeline.stage_of(fine_voxels) is pipeline.stages[1]
    expected = mesh_to_structure(normalize_mesh(coarse[0].vertices, 0.95), coarse[0].faces, 128)
    assert {*map(tuple, fine_voxels.coords[:, 1:].tolist())} == {*map(tuple, expected.tolist())}
    fine_latents = pipeline.sample_latents(fine_voxels, tokens, [4], 2)
    sdf, decoded = pipeline.decode_blocks(fine_latents, fine_voxels).to_voxels()
    assert decoded.resolution == 128
    mesh = pipeline.blocks_to_meshes(SDFBlocks.of_voxels(sdf, decoded))[0]
    whole = pipeline.generate(draw_object(), 4, **STEPS)
    assert mesh.vertices.tobytes() == whole.vertices.tobytes() and mesh.faces.tobytes() == whole.faces.tobytes()


def with_fine(pipeline, **changes):
    """Return the pipeline with changed fields of its second stage."""
    coarse, fine = pipeline.stages
    return dataclasses.replace(pipeline, stages=(coarse, dataclasses.replace(fine, **changes)))


def test_the_second_stage_uses_its_own_networks_and_noise(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.structure_of(pipeline.generate_batch([draw_object()], [1], fine=False, **STEPS))
    fine = pipeline.sample_latents(voxels, tokens, [1], 2)
    swapped = with_fine(pipeline, latent_dit=pipeline.stages[0].latent_dit)
    assert not torch.equal(fine, swapped.sample_latents(voxels, tokens, [1], 2))
    decoded = pipeline.decode_blocks(fine, voxels).values
    swapped = with_fine(pipeline, sdf_vae=pipeline.stages[0].sdf_vae)
    assert not torch.equal(decoded, swapped.decode_blocks(fine, voxels).values)
    swapped = with_fine(pipeline, noise_stream=pipeline.stages[0].noise_stream)
    assert not torch.equal(fine, swapped.sample_latents(voxels, tokens, [1], 2))


def test_a_batch_gives_the_meshes_of_its_samples(pipeline):
    images = [draw_object(), draw_object((40, 90))]
    together = pipeline.generate_batch(images, [3, 4], **STEPS)
    for mesh, image, seed in zip(together, images, [3, 4], strict=True):
        alone = pipeline.generate(image, seed, **STEPS)
        assert_closed(mesh)
        assert abs(len(mesh.faces) - len(alone.faces)) <= 0.02 * len(alone.faces)


def test_refiners_decide_what_is_inside(pipeline):
    mesh = pipeline.generate(draw_object(), 5, use_refiners=True, **STEPS)
    assert_closed(mesh)
    filled = pipeline.generate(draw_object(), 5, **STEPS)
    assert mesh.vertices.tobytes() != filled.vertices.tobytes()


def test_refined_surfaces_are_those_of_the_refined_volumes(pipeline):
    """Compare the blocks that become the mesh with the refined dense volume of the same decoded values."""
    from d3ds2.networks.refined_blocks import refine_distances

    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.sample_structure(tokens, [6], 2)
    latents = pipeline.sample_latents(voxels, tokens, [6], 2)
    blocks, level = pipeline.decode_surface(latents, voxels, use_refiners=True)
    assert level == 0.4  # 2 x 0.2, as released
    sdf, features, fine = pipeline.stages[0].sdf_vae.decode_with_features(latents, voxels)
    volume = refine_distances(pipeline.stages[0].refiner, sdf, features, fine)
    volume = volume.view(8, 8, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 8, 8)
    everywhere = torch.cartesian_prod(*[torch.arange(8)] * 3)
    expected = sdf_to_mesh(everywhere.numpy(), volume.numpy(), 64, level)
    actual = sdf_to_mesh(*(x.numpy() for x in blocks.samples()[0]), 64, level)
    np.testing.assert_allclose(actual.vertices, expected.vertices, atol=1e-4)
    assert np.array_equal(actual.faces, expected.faces)


def test_offloaded_networks_make_the_same_mesh(folder, pipeline):
    networks, sampling = load_model(folder)
    offloaded = build_pipeline(networks, sampling, device="cpu")
    pointers = [p.data_ptr() for network in networks.values() for p in network.parameters()]
    expected = pipeline.generate(draw_object(), 7, **STEPS)
    assert offloaded.generate(draw_object(), 7, **STEPS).vertices.tobytes() == expected.vertices.tobytes()
    assert pointers == [p.data_ptr() for network in networks.values() for p in network.parameters()]


def test_weights_come_back_even_after_an_error():
    network = torch.nn.BatchNorm1d(3)
    with pytest.raises(KeyboardInterrupt), on_device(network, "cpu") as device:
        assert device.type == "cpu"
        network.weight.data, network.running_mean.data = torch.zeros(3), torch.ones(3)
        raise KeyboardInterrupt
    assert network.weight.equal(torch.ones(3)) and network.running_mean.equal(torch.zeros(3))


@pytest.mark.gpu
def test_weights_are_on_the_gpu_only_inside_the_block(folder):
    network = torch.nn.BatchNorm1d(3)
    with on_device(network, "cuda"):
        assert network.weight.is_cuda and network.running_mean.is_cuda
    assert not network.weight.is_cuda and not network.running_mean.is_cuda
    pipeline = load_pipeline(folder, "cuda", torch.float32)
    assert_closed(pipeline.generate(draw_object(), 3, use_refiners=True, **STEPS))
    assert not any(parameter.is_cuda for parameter in pipeline.stages[1].latent_dit.parameters())


def test_a_memory_budget_changes_only_rounding(pipeline):
    tokens = pipeline.encode_image([draw_object()])
    voxels = pipeline.structure_of(pipeline.generate_batch([draw_object()], [1], fine=False, **STEPS))
    latents = pipeline.sample_latents(voxels, tokens, [1], 2)
    whole, calls = pipeline.decode_blocks(latents, voxels), []
    with pytest.raises(ValueError, match="memory budget of at least") as raised:
        pipeline.decode_blocks(latents, voxels, 1)
    least = int(str(raised.value).split(" bytes")[0].split()[-1])
    chunked = pipeline.decode_blocks(latents, voxels, least, lambda *call: calls.append(call))
    assert len(calls) > 1 and torch.equal(chunked.coords, whole.coords)
    assert (chunked.values - whole.values).abs().max() < 1e-4
    limited = dataclasses.replace(pipeline, memory_budget=least)
    assert torch.equal(limited.decode_blocks(latents, voxels).values, chunked.values)


def test_guidance_together_and_apart(pipeline):
    tokens = pipeline.encode_image([draw_object()]).select_foreground()
    voxels = pipeline.structure_of(pipeline.generate_batch([draw_object()], [1], fine=False, **STEPS))
    x_t = torch.randn(len(voxels), 16)
    velocities = [
        guided_velocity(pipeline.stages[1].latent_dit, tokens, 7.0, voxels, together)(x_t, 0.5)
        for together in (True, False)
    ]
    torch.testing.assert_close(*velocities, atol=2e-3, rtol=2e-3)


def test_networks_get_times_in_half_precision(pipeline, monkeypatch):
    times = []
    for network in (pipeline.structure_dit, *(stage.latent_dit for stage in pipeline.stages)):
        embedder = network.time_embedder
        monkeypatch.setattr(embedder, "forward", lambda t, f=embedder.forward: times.append(t[0].item() * 1000) or f(t))
    pipeline.generate(draw_object(), 1, **STEPS)
    # two steps and the released shifts: 1000, and shift(shift(1 / 1000)) = 34.8 or 60.2, which float16 cannot hold
    assert len(times) == 6 and times[0] == times[2] == times[4] == 1000
    for t, shift in zip(times[1::2], (6, 6, 8), strict=True):
        exact = 1000 * time_schedule(2, shift)[1].item()
        assert t == pytest.approx(torch.tensor(exact).half().item(), abs=1e-4) and abs(t - exact) > 1e-3


def test_models_that_do_not_fit_are_named(folder):
    networks, sampling = load_model(folder)
    for missing, kept in (
        ({"fine_sdf_vae"}, sampling),
        ({"fine_latent_dit", "fine_sdf_vae"}, sampling),
        (set(), dataclasses.replace(sampling, fine=None)),
    ):
        with pytest.raises(ModelFolderError, match="all together"):
            build_pipeline({name: networks[name] for name in networks.keys() - missing}, kept)


def test_a_model_says_which_networks_it_lacks(folder):
    networks, sampling = load_model(folder)
    plain = {name: network for name, network in networks.items() if "refiner" not in name}
    with pytest.raises(ModelFolderError, match="has no refiner"):
        build_pipeline(plain, sampling).generate(draw_object(), use_refiners=True, **STEPS)
    coarse = {name: network for name, network in plain.items() if not name.startswith("fine_")}
    single = build_pipeline(coarse, dataclasses.replace(sampling, fine=None))
    assert_closed(single.generate(draw_object(), 3, **STEPS))
    with pytest.raises(ModelFolderError, match="no second stage"):
        single.structure_of([])


def test_sampling_may_differ_from_the_folders(folder, pipeline):
    sampling = dataclasses.replace(pipeline.sampling, latent_steps=3, level=0.1)
    changed = load_pipeline(folder, sampling=sampling)
    assert changed.stages[0].steps == 3 and changed.sampling.level == 0.1
    assert changed.stages[1].steps == pipeline.stages[1].steps == 15


def test_an_empty_sample_of_blocks_is_an_error(pipeline):
    blocks = SDFBlocks(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 8, 8, 8), 64, 1)
    with pytest.raises(ValueError, match="surface of image came out empty"):
        pipeline.blocks_to_meshes(blocks)


def test_the_command_line_goes_through_both_stages(folder, tmp_path, capsys):
    picture = tmp_path / "object.png"
    draw_object().save(picture)
    command = [str(picture), "--model", str(folder), "--device", "cpu", "--steps", "2", "-o"]
    assert main([*command, str(tmp_path / "fine.glb")]) == 0
    shown = capsys.readouterr().err
    assert "9/9 fine mesh" in shown and "5/9 mesh" in shown
    assert main([*command, str(tmp_path / "coarse.glb"), "--coarse", "--memory", "0.5"]) == 0
    assert "5/5 mesh" in capsys.readouterr().err
    assert (tmp_path / "coarse.glb").stat().st_size < (tmp_path / "fine.glb").stat().st_size
    assert main([*command, str(tmp_path / "no.glb"), "--coarse", "--memory", "1e-6"]) == 2
    assert "error: --memory: expected a memory budget of at least" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "no.glb"), "--memory", "0"]) == 2
    assert main([*command[:1], "--steps", "2", "--refine", "--device", "cpu", "-o", str(tmp_path / "no.glb")]) == 2
    assert "the model has no refiner" in capsys.readouterr().err
