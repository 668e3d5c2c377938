"""The sampling nodes over stand-ins of ComfyUI: several views of one object, the sampler, core's SIGMAS."""

import inspect

import pytest
import torch

from d3ds2.pipeline import load_pipeline
from d3ds2.rectified_flow import Sampler, time_schedule
from tests.support.tiny_model import draw_object, picture

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def pipeline(comfy):
    return load_pipeline(comfy.folder / "models" / "direct3d_s2" / "random")


def test_a_batch_of_views_makes_one_structure_and_one_latent(comfy, model, pipeline):
    images, views = picture(2), [draw_object(), draw_object().rotate(90)]
    inputs = {"model": model, "image": images, "seed": 4, "views_of_one_object": True}
    structure = comfy.run("D3DS2SparseStructureSample", **inputs)[0]
    latent = comfy.run("D3DS2SSADiTSample", structure=structure, **inputs)[0]
    with torch.inference_mode():
        tokens = pipeline.encode_views([views])
        voxels = pipeline.sample_structure(tokens, [4])
        assert torch.equal(structure.coords, voxels.coords) and structure.batch_size == 1
        assert torch.equal(latent.latents, pipeline.sample_latents(voxels, tokens, [4]))
    assert comfy.progress[-1][:2] == (2, 2)  # two steps of one sample


def test_views_guide_every_structure_of_a_batch(comfy, model):
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(2))[0]
    views = {"model": model, "image": picture(3), "views_of_one_object": True}
    latent = comfy.run("D3DS2SSADiTSample", structure=structure, **views)[0]
    assert len(latent.latents) == len(structure.coords)


def test_several_pictures_for_one_structure_point_to_the_switch(comfy, model, structure):
    with pytest.raises(ValueError, match="turn on views_of_one_object"):
        comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(2))


@pytest.mark.parametrize("node_id", ["D3DS2SparseStructureSample", "D3DS2SSADiTSample"])
def test_more_views_ask_for_more_memory(comfy, model, structure, node_id):
    given = {"structure": structure} if node_id == "D3DS2SSADiTSample" else {}
    for count in (1, 6):
        comfy.run(node_id, model=model, image=picture(count), views_of_one_object=True, **given)
    (_, one), (_, six) = comfy.loads
    assert one <= six  # at this size, encoding a picture or decoding takes more than the tokens


def test_the_sampler_inputs_reach_both_stages(comfy, model, structure, pipeline):
    inputs = {"sampler": "heun", "guidance_start": 0.9, "guidance_end": 0.2, "guidance_rescale": 0.5}
    how = Sampler("heun", (0.2, 0.9), 0.5)
    made = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), seed=5, **inputs)[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(), seed=5, **inputs)[0]
    with torch.inference_mode():
        tokens = pipeline.encode_image([draw_object()])
        assert torch.equal(made.coords, pipeline.sample_structure(tokens, [5], sampler=how).coords)
        expected = pipeline.sample_latents(structure.voxels(), tokens, [5], sampler=how)
    assert torch.equal(latent.latents, expected)


def test_sigmas_replace_the_steps_and_the_schedule(comfy, model, structure):
    """A flow model of core mixes sigma · noise + (1 - sigma) · data: its sigmas are our times."""
    sampling = model.pipeline.sampling
    own = time_schedule(sampling.structure_steps, sampling.structure_shift).float()
    expected = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), seed=5)[0]
    made = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), seed=5, steps=9, sigmas=own)[0]
    assert torch.equal(made.coords, expected.coords)
    for node_id, given in (("D3DS2SparseStructureSample", {}), ("D3DS2SSADiTSample", {"structure": structure})):
        sigmas = torch.tensor([0.997, 0.6, 0.3, 0.1, 0.0])
        comfy.run(node_id, model=model, image=picture(), sigmas=sigmas, **given)
        assert comfy.progress[-1][:2] == (4, 4)


@pytest.mark.parametrize(
    "sigmas",
    [[14.6, 3.0, 0.0], [0.6, 0.3, 0.0], [1.0, 0.5, 0.2], [1.0, 0.4, 0.4, 0.0], [0.0, 1.0], [1.0], [], [torch.nan, 0.0]],
)
def test_other_sigmas_are_refused_with_advice(comfy, model, sigmas):
    with pytest.raises(ValueError, match=r"fall from 1 to 0, got .* use a scheduler with a flow model"):
        comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), sigmas=torch.tensor(sigmas))
    assert not comfy.loads


def test_guidance_that_ends_before_it_starts_is_refused(comfy, model):
    with pytest.raises(ValueError, match=r"guidance_start 0\.2 lies below guidance_end 0\.8"):
        comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), guidance_start=0.2, guidance_end=0.8)
    assert not comfy.loads


def test_defaults_of_the_schema_are_those_of_older_workflows(comfy, model):
    """Widgets that an older workflow lacks have defaults in `execute` too."""
    for node_id in ("D3DS2SparseStructureSample", "D3DS2SSADiTSample"):
        node = comfy.nodes[node_id]
        defaults = {name: p.default for name, p in inspect.signature(node.execute).parameters.items()}
        optional = [port for port in node.define_schema().inputs if port.optional]
        assert len(optional) == 6 and all(defaults[port.id] == port.default for port in optional)


def test_the_number_of_tokens_is_that_of_the_largest_structure(comfy, model):
    structure, _, text, count = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(3)).args
    assert count == max(structure.voxels().counts) and f"{count:,}" in text
