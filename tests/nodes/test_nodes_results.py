"""The nodes over stand-ins of ComfyUI: what they make, alone and in a chain."""

import numpy as np
import pytest
import torch

from d3ds2.images.foreground import cut_out
from d3ds2.meshes.mesh import Mesh
from d3ds2.pipeline import load_pipeline
from tests.support.comfy_stand_ins import ComfyUI, PaddedMESH
from tests.support.tiny_model import draw_object, picture

pytestmark = pytest.mark.usefixtures("fresh")


def test_the_chain_of_nodes_is_the_pipeline_bit_for_bit(comfy, mesh):
    with torch.inference_mode():
        expected = load_pipeline(comfy.folder / "models" / "direct3d_s2" / "random").generate(draw_object(), seed=5)
    assert mesh.vertices[0].numpy().tobytes() == (expected.vertices / 2).tobytes()  # in the box of core's own nodes
    assert mesh.faces[0].numpy().tobytes() == expected.faces.tobytes()
    assert mesh.vertices.dtype == torch.float32 and mesh.faces.dtype == torch.int64
    torch.testing.assert_close(mesh.normals[0], torch.from_numpy(expected.normals))


def test_a_plain_background_does_without_an_alpha_channel(comfy, model):
    with torch.inference_mode():
        pipeline = load_pipeline(comfy.folder / "models" / "direct3d_s2" / "random")
        tokens = pipeline.encode_image([cut_out(draw_object(mode="RGB"), method="plain")])
        expected = pipeline.sample_structure(tokens, [1])
    made = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(mode="RGB"), seed=1)
    assert torch.equal(made[0].coords, expected.coords)


def test_samples_of_a_batch_equal_those_made_alone(comfy, model):
    images = picture(3)
    together = comfy.run("D3DS2SparseStructureSample", model=model, image=images, seed=2**64 - 2)
    latents = comfy.run("D3DS2SSADiTSample", model=model, structure=together[0], image=images, seed=9)[0]
    meshes = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latents)[0]
    latents = latents.latents.split(together[0].voxels().counts)
    for i, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        alone = comfy.run("D3DS2SparseStructureSample", model=model, image=images[i : i + 1], seed=seed)
        assert torch.equal(together[0].voxels().sample(i).coords, alone[0].coords)
        assert torch.equal(together[1].data[i], alone[1].data[0])
        latent = comfy.run("D3DS2SSADiTSample", model=model, structure=alone[0], image=images[i : i + 1], seed=9 + i)[0]
        assert torch.equal(latent.latents, latents[i])
        mesh = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
        count = int(meshes.vertex_counts[i])
        assert torch.equal(meshes.vertices[i, :count], mesh.vertices[0]) and not meshes.vertices[i, count:].any()
        assert torch.equal(meshes.faces[i, : meshes.face_counts[i]], mesh.faces[0])
    assert len(together[2].split("+")) == 3 and together[2].endswith("tokens at 8³")


def test_one_image_guides_several_structures(comfy, model):
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(2))[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    assert len(latent.latents) == len(structure.coords)
    with pytest.raises(ValueError, match="expected 1 image or 2, one per structure, got 3"):
        comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(3))


def test_voxels_are_laid_out_as_core_reads_them(comfy, model, structure):
    voxel = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), seed=5)[1]
    assert voxel.data.shape == (1, 8, 8, 8) and voxel.data.sum() == len(structure.coords)
    for _, x, y, z in structure.coords.tolist():
        assert voxel.data[0, z, y, x] == 1


def test_zero_means_the_default_of_the_model(comfy, model):
    def run(**inputs):
        return comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), **inputs)[0].coords

    sampling = model.pipeline.sampling
    own = run(steps=sampling.structure_steps, guidance_scale=sampling.structure_guidance)
    assert torch.equal(run(), own)
    assert not torch.equal(run(guidance_scale=1.0), own)
    run(steps=5)
    assert comfy.progress[-1][:2] == (5, 5)


def test_half_precision_runs_through_all_nodes(comfy, ball):
    model = comfy.run("LoadD3DS2Model", model="random", precision="bf16")[0]
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=picture())[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    mesh = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    assert latent.latents.dtype == torch.float32 and mesh.faces.shape[1] > 100
    assert len(comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=ball)[0].latents) > 0


def test_decoding_options_reach_the_surface(comfy, model, latent, mesh):
    def run(**inputs):
        return comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, **inputs)

    everything = run(min_component=0.0)[0]
    assert everything.faces.shape[1] >= mesh.faces.shape[1] >= run(keep_largest=True)[0].faces.shape[1]
    assert not torch.equal(run(level=0.3)[0].vertices[0, :10], mesh.vertices[0, :10])
    sdf = run()[1]
    assert sdf.values.shape == (len(latent.latents), 8, 8, 8) and sdf.resolution == 64
    assert torch.equal(sdf.block_coords, latent.structure.coords)  # a token is a block
    for value in (sdf, latent, latent.structure):  # newer versions measure these in their cache
        assert all(isinstance(tensor, torch.Tensor) for tensor in value._comfy_cache_tensors())


def test_a_mesh_goes_through_the_vae_and_into_a_structure(comfy, model, ball):
    latent = comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=ball)[0]
    structure, voxel, text, count = comfy.run("D3DS2StructureFromMesh", model=model, mesh=ball).args
    assert torch.equal(structure.coords, latent.structure.coords) and voxel.data.sum() == len(structure.coords)
    assert text == f"{len(structure.coords):,} tokens at 8³" and count == len(structure.coords)
    # every vertex of the surface lies in a voxel of the structure
    low, high = ball.vertices[0].amin(0), ball.vertices[0].amax(0)
    fitted = (ball.vertices[0] - (low + high) / 2) * (1.9 / (high - low).max())
    occupied = {tuple(c) for c in structure.coords[:, 1:].tolist()}
    assert {tuple(c) for c in ((fitted + 1) * 4).int().tolist()} <= occupied
    decoded = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    assert decoded.faces.shape[1] > 0
    refined = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    assert refined.structure is structure


def test_a_batch_of_meshes_keeps_each_mesh(comfy, model, ball):
    module = comfy.module("nodes.comfy.mesh_socket")
    box = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * 0.5
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6]])
    meshes = [module.from_socket(ball)[0], Mesh(box, faces, box)]
    both = module.to_socket(meshes)
    assert both.vertex_counts.tolist() == [ball.vertices.shape[1], 8]
    for before, after in zip(meshes, module.from_socket(both), strict=True):
        for name in ("vertices", "faces", "normals"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    structure = comfy.run("D3DS2StructureFromMesh", model=model, mesh=both)[0]
    alone = comfy.run("D3DS2StructureFromMesh", model=model, mesh=module.to_socket(meshes[1:]))[0]
    assert structure.batch_size == 2 and torch.equal(structure.voxels().sample(1).coords, alone.coords)
    assert comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=both)[0].structure.batch_size == 2


def test_meshes_of_newer_versions_carry_their_counts_as_arguments(tmp_path):
    comfy = ComfyUI(tmp_path, PaddedMESH, "another pack")
    try:
        module = comfy.module("nodes.comfy.mesh_socket")
        triangle = np.eye(3, dtype=np.float32)
        meshes = [Mesh(triangle, np.array([[0, 1, 2]] * n), triangle) for n in (1, 2)]
        socket = module.to_socket(meshes)
        assert socket.face_counts.tolist() == [1, 2] and socket.vertex_counts.tolist() == [3, 3]
        assert module.to_socket(meshes[:1]).face_counts is None
    finally:
        comfy.close()
