"""Sizes and places over stand-ins of ComfyUI: core's box for what is new, its own place for what was made of a mesh."""

import numpy as np
import pytest
import torch
import trimesh

from tests.support.comfy_stand_ins import MESH
from tests.support.tiny_model import picture

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def tiny(comfy):
    """The shipped model: its VAE keeps the shape of what it encodes, which one with random weights does not."""
    return comfy.run("LoadD3DS2Model", model="tiny")[0]


def block(offset=(0.0, 0.0, 0.0), scale=1.0) -> MESH:
    """Return a block 1.2 × 0.8 × 0.5, scaled and moved."""
    box = trimesh.creation.box((1.2, 0.8, 0.5)).subdivide().subdivide()
    vertices = np.asarray(box.vertices) * scale + offset
    return MESH(torch.from_numpy(vertices).float()[None], torch.from_numpy(np.asarray(box.faces))[None])


def solid(mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices[0].numpy(), mesh.faces[0].numpy(), process=False)


def test_a_new_mesh_lies_in_the_box_of_core(mesh):
    assert mesh.vertices.abs().max() <= 0.5


@pytest.mark.parametrize(("offset", "scale"), [((3, -40, 500), 90.0), ((0.2, 0, 0.1), 0.05)])
def test_an_encoded_mesh_returns_to_its_own_size_and_place(comfy, tiny, offset, scale):
    before = solid(block(offset, scale))
    latent = comfy.run("D3DS2VAEEncodeMesh", model=tiny, mesh=block(offset, scale))[0]
    after = solid(comfy.run("D3DS2VAEDecodeSDF", model=tiny, latent=latent)[0])
    voxel = 1.2 * scale / 0.95 / tiny.stages[latent.structure.resolution].sdf_resolution
    assert np.abs(after.bounds - before.bounds).max() < 2 * voxel
    assert after.is_watertight and after.volume == pytest.approx(before.volume, rel=0.1)


def test_a_batch_returns_each_mesh_to_its_own_place(comfy, tiny):
    both = block()
    both.vertices = torch.cat([both.vertices, 5 * both.vertices + 100])
    both.faces = both.faces.expand(2, -1, -1)
    latent = comfy.run("D3DS2VAEEncodeMesh", model=tiny, mesh=both)[0]
    module = comfy.module("nodes.comfy.mesh_socket")
    after = module.from_socket(comfy.run("D3DS2VAEDecodeSDF", model=tiny, latent=latent)[0])
    for mesh, centre, width in zip(after, (0, 100), (1.2, 6), strict=True):
        np.testing.assert_allclose((mesh.vertices.min(0) + mesh.vertices.max(0)) / 2, centre, atol=0.02 * width)
        assert np.ptp(mesh.vertices[:, 0]) == pytest.approx(width, rel=0.03)


def test_a_refined_mesh_returns_to_its_own_place(comfy, model, ball):
    moved = MESH(ball.vertices * 10 - 70, ball.faces)
    structure = comfy.run("D3DS2StructureFromMesh", model=model, mesh=moved)[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    refined = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    low, high = moved.vertices[0].amin(0), moved.vertices[0].amax(0)
    side = (high - low).max() / 1.9  # half an edge of the model's box, in the mesh's own units
    assert ((refined.vertices[0] - (low + high) / 2).abs() <= side * 1.001).all()


def test_without_fit_core_s_box_is_the_models(comfy, tiny):
    latent = comfy.run("D3DS2VAEEncodeMesh", model=tiny, mesh=block(scale=0.5), fit=False)[0]
    after = solid(comfy.run("D3DS2VAEDecodeSDF", model=tiny, latent=latent)[0])
    np.testing.assert_allclose(after.extents, [0.6, 0.4, 0.25], atol=0.02)


def test_an_unused_vertex_does_not_shrink_the_object(comfy, tiny):
    stray = block()
    stray.vertices = torch.cat([stray.vertices, torch.full((1, 1, 3), 900.0)], 1)
    with_it, without = (comfy.run("D3DS2StructureFromMesh", model=tiny, mesh=mesh)[0] for mesh in (stray, block()))
    assert len(with_it.coords) == len(without.coords) > 1000 and with_it.places == without.places


@pytest.mark.parametrize("front_end", ["1.43.18", "1.44.19", None])
@pytest.mark.parametrize("size", [(0.2, 1.0, 0.3), (3.0, 0.1, 0.2), (40.0, 40.0, 40.0)])
def test_the_camera_sees_the_whole_object_in_every_front_end(comfy, monkeypatch, front_end, size):
    """Older viewers scale a model to an edge of 5 on the ground, newer ones leave it where it is."""
    module = comfy.module("nodes.comfy.viewer_camera")

    def version(_package):
        if front_end is None:
            raise module.PackageNotFoundError
        return front_end

    monkeypatch.setattr(module, "version", version)
    corners = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T * size + (7, 8, 9)
    camera = module.camera_of(corners.astype(np.float32))
    if front_end == "1.43.18":
        corners = (corners - (7, 8, 9)) * 5 / max(size)
        corners[:, 1] -= corners[:, 1].min()
    position, target = (np.array([camera[key][axis] for axis in "xyz"]) for key in ("position", "target"))
    np.testing.assert_allclose(target, (corners.min(0) + corners.max(0)) / 2, atol=1e-4 * max(size))
    ahead = (target - position) / np.linalg.norm(target - position)
    right = np.cross(ahead, [0, 1, 0])
    right /= np.linalg.norm(right)
    up = np.cross(right, ahead)
    depth, across, along = ((corners - position) @ axis for axis in (ahead, right, up))
    seen = np.maximum(np.abs(across), np.abs(along)) / depth / np.tan(np.radians(17.5))
    assert depth.min() > 0 and 0.8 < seen.max() < 0.95  # 1 is the edge of the picture
