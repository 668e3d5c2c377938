"""The latent voxels of a mesh for a finer stage, as in the official code and by the definition of the distance."""

import numpy as np
import pytest

from d3ds2.meshes.mesh_to_sdf import normalize_mesh
from d3ds2.meshes.mesh_to_structure import mesh_to_structure
from d3ds2.meshes.triangle_distance import triangle_distance_reference
from tests.support.golden import ROOT, golden, over


@over("mesh_index*")
def test_structure_is_the_official_one(name):
    data = golden(name)
    vertices, faces = data.inputs["vertices"].numpy(), data.inputs["faces"].numpy().astype(np.int64)
    normalized = normalize_mesh(vertices, data.config["normalize_scale"])
    np.testing.assert_allclose(normalized, data.outputs["normalized"].numpy(), atol=1e-6)
    for size in data.config["sizes"]:
        blocks = mesh_to_structure(normalized, faces, size, data.config["threshold"])
        assert np.array_equal(blocks, data.outputs[f"latent_index_{size}"].numpy()[:, 1:])

        points, values = (data.outputs[f"udf_{kind}_{size}"].numpy() for kind in ("points", "values"))
        some = slice(None, None, 16)
        halved = normalized[faces] / 2  # the released code measures distances in a unit cube
        distance = triangle_distance_reference(points[some] / (size - 1) - 0.5, halved)
        np.testing.assert_allclose(distance, values[some], atol=3e-7)


@pytest.mark.parametrize("name", ["kenney_foodkit_v1_2_fries", "thebasemesh_cycle_mid_stand"])
@pytest.mark.parametrize("resolution", [32, 64])
def test_blocks_are_those_with_a_near_grid_point(name, resolution):
    with np.load(ROOT / "tests" / "data" / "meshes" / f"{name}.npz") as file:
        vertices, faces = normalize_mesh(file["v"]), file["f"][:250].astype(np.int64)
    axis = np.linspace(-1, 1, resolution)
    found = mesh_to_structure(vertices, faces, resolution, threads=2)
    expected = []
    for block in np.ndindex((resolution // 8,) * 3):
        points = np.stack(np.meshgrid(*(axis[8 * b : 8 * b + 8] for b in block), indexing="ij"), -1).reshape(-1, 3)
        reach = 8 / resolution
        corners = vertices[faces]
        close = ((corners.min(1) < points.max(0) + reach) & (corners.max(1) > points.min(0) - reach)).all(1)
        if close.any() and triangle_distance_reference(points, corners[close]).min() < reach - 1e-9:
            expected.append(block)
    assert 0 < len(expected) < (resolution // 8) ** 3
    assert found.dtype == np.int32 and np.array_equal(found, np.array(expected))


def test_large_triangles_reach_blocks_without_a_vertex():
    vertices = np.array([[-0.95, -0.95, 0.0], [0.95, -0.95, 0.0], [0.0, 0.95, 0.0]])
    blocks = mesh_to_structure(vertices, np.array([[0, 1, 2]]), 128)
    assert [8, 8, 8] in blocks.tolist() and [8, 8, 7] in blocks.tolist() and len(blocks) > 200


@pytest.mark.parametrize(
    ("vertices", "faces", "resolution", "message"),
    [
        (np.zeros((3, 3)), np.array([[0, 1, 2]]), 60, "multiple of 8"),
        (np.full((3, 3), 2.0), np.array([[0, 1, 2]]), 64, "in \\[-1, 1\\]"),
        (np.zeros((3, 3)), np.zeros((0, 3), np.int64), 64, "faces \\(F, 3\\) with F > 0"),
        (np.full((3, 3), np.nan), np.array([[0, 1, 2]]), 64, "finite"),
    ],
)
def test_wrong_arguments_are_named(vertices, faces, resolution, message):
    with pytest.raises(ValueError, match=message):
        mesh_to_structure(vertices, faces, resolution)
