"""A converted model of two stages through the nodes: the second stage starts from the mesh of the first."""

import pytest
import torch

from d3ds2.official.convert import convert
from d3ds2.pipeline import load_pipeline
from tests.support.official_release import write_release
from tests.support.tiny_model import draw_object, picture


@pytest.fixture(scope="module")
def comfy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfy")
    write_release(folder / "release", "v1.1")
    (folder / "models" / "direct3d_s2").mkdir(parents=True)
    convert(folder / "release", folder / "models" / "direct3d_s2" / "official")
    return folder


def test_the_nodes_make_what_the_pipeline_makes(comfy):
    model = comfy.run("LoadD3DS2Model", model="official")[0]
    assert {"fine_latent_dit", "fine_sdf_vae"} < model.patchers.keys() and set(model.stages) == {8, 16}
    image, steps = picture(), {"seed": 4, "steps": 2}
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=image, **steps)[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=image, **steps)[0]
    coarse = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    fine = comfy.run("D3DS2StructureFromMesh", model=model, mesh=coarse)[0]
    assert fine.resolution == 16
    comfy.loads.clear()
    fine_latent = comfy.run("D3DS2SSADiTSample", model=model, structure=fine, image=image, **steps)[0]
    mesh = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=fine_latent)[0]

    with torch.inference_mode():
        pipeline = load_pipeline(comfy.folder / "models" / "direct3d_s2" / "official")
        expected = pipeline.generate(draw_object(), 4, structure_steps=2, latent_steps=2, fine_steps=2)
    # it has the size and the place of the first stage's mesh
    placed = comfy.module("d3ds2.meshes.placement").place(expected, fine.place_of(0))
    assert mesh.vertices[0].numpy().tobytes() == placed.vertices.tobytes()
    assert mesh.faces[0].numpy().tobytes() == expected.faces.tobytes()

    assert model.stages[16].steps == pipeline.sampling.fine.steps != model.stages[8].steps
    assert latent.made_for != fine_latent.made_for
    encoded = comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=coarse)[0]
    assert encoded.structure.resolution == 16 and encoded.made_for == fine_latent.made_for
    wrong = type(structure)(structure.coords, 32, 1)
    with pytest.raises(ValueError, match=r"it is 32³, but the model '.*' samples at 8³ and 16³"):
        comfy.run("D3DS2SSADiTSample", model=model, structure=wrong, image=image)
