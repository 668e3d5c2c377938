"""Meshes are fitted into a model's box, returned to their own places, and scaled to a real size for a file."""

import numpy as np
import pytest

from d3ds2.meshes.mesh import Mesh, volume
from d3ds2.meshes.placement import HALF_BOX, fit, in_file_frame, place, unit_of

FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
VERTICES = np.array([[0, 0, 0], [300, 0, 0], [0, 200, 0], [0, 0, 100]], np.float32) + 1000


def tetrahedron(vertices=VERTICES) -> Mesh:
    return Mesh(vertices, FACES, np.tile(np.float32([0, 1, 0]), (4, 1)))


def test_a_fitted_mesh_returns_to_its_own_size_and_place():
    fitted, own = fit(VERTICES)
    assert np.abs(fitted).max() == pytest.approx(0.95)
    np.testing.assert_allclose(place(tetrahedron(fitted), own).vertices, VERTICES, rtol=1e-6)


def test_core_has_a_box_of_half_the_size():
    fitted = fit(VERTICES)[0]
    assert np.array_equal(place(tetrahedron(fitted), HALF_BOX).vertices, fitted / 2)


@pytest.mark.parametrize(("kind", "unit", "per_metre"), [(".glb", "m", 1), (".obj", "m", 1), (".stl", "mm", 1000)])
def test_the_longest_edge_gets_its_size_in_the_unit_of_the_file(kind, unit, per_metre):
    sized = in_file_frame(tetrahedron(), kind, 0.06)
    assert unit_of(kind) == unit
    np.testing.assert_allclose(np.ptp(sized.vertices, axis=0), per_metre * np.array([0.06, 0.04, 0.02]), rtol=1e-4)
    np.testing.assert_array_equal(in_file_frame(tetrahedron(), kind, 0.0).vertices, VERTICES)


def test_a_vertex_of_no_face_does_not_count():
    stray = np.concatenate([VERTICES, np.float32([[9e6, 0, 0]])])
    sized = in_file_frame(Mesh(stray, FACES, np.zeros_like(stray)), ".glb", 1.0)
    np.testing.assert_allclose(np.ptp(sized.vertices[:4], axis=0), [1, 2 / 3, 1 / 3], rtol=1e-3)


def test_z_up_turns_without_mirroring():
    mesh = tetrahedron()
    turned = in_file_frame(mesh, ".stl", 0.0, "Z")
    np.testing.assert_array_equal(np.ptp(turned.vertices, axis=0), [300, 100, 200])
    np.testing.assert_array_equal(turned.normals[0], [0, 0, 1])
    assert volume(turned.vertices, FACES) == pytest.approx(volume(mesh.vertices, FACES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((".glb", -1.0), "expected a size in metres from 1e-06 to 1e.06, or 0, got -1"),
        ((".glb", 1e300), "expected a size in metres from"),
        ((".glb", 2**64), "expected a size in metres from"),
        ((".glb", float("nan")), "expected a size in metres from"),
        ((".glb", float("nan")), "expected a size"),
        ((".glb", float("inf")), "expected a size"),
        ((".glb", 1.0, "X"), "expected an up axis of Y or Z, got 'X'"),
    ],
)
def test_wrong_sizes_and_axes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        in_file_frame(tetrahedron(), *arguments)


def test_a_point_has_no_size():
    with pytest.raises(ValueError, match="all vertices in one point"):
        in_file_frame(tetrahedron(np.ones((4, 3), np.float32)), ".glb")
