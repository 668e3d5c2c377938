"""UVs, textures and vertex colours in files, as other programs read them."""

import io
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
import trimesh

from d3ds2.meshes.appearance import HELD, Appearance, not_held
from d3ds2.meshes.mesh import Mesh, seamless_normals
from d3ds2.meshes.mesh_file import FORMATS, mesh_bytes
from d3ds2.meshes.three_mf import CORE

BOX = trimesh.creation.box((30, 20, 10))
MESH = Mesh(
    np.asarray(BOX.vertices, np.float32), np.asarray(BOX.faces, np.int64), np.asarray(BOX.vertex_normals, np.float32)
)
UVS = np.random.default_rng(0).random((8, 2)).astype(np.float32)
COLORS = np.random.default_rng(1).random((8, 3)).astype(np.float32)
TEXTURE = np.random.default_rng(2).integers(0, 256, (4, 6, 3), dtype=np.uint8)
ALL = Appearance(UVS, {"texture": TEXTURE}, COLORS)


def load(kind: str, look: Appearance | None = None) -> trimesh.Trimesh:
    data = mesh_bytes(kind, MESH, appearance=look)
    loaded = trimesh.load(io.BytesIO(data), file_type=kind[1:], process=False)
    return next(iter(loaded.geometry.values())) if isinstance(loaded, trimesh.Scene) else loaded


def test_every_format_has_a_rule():
    assert set(HELD) == set(FORMATS)


def test_a_glb_holds_all_of_it():
    look = Appearance(UVS, dict.fromkeys(("texture", "metallic_roughness", "normal_map", "occlusion"), TEXTURE), COLORS)
    loaded = load(".glb", look)
    np.testing.assert_allclose(loaded.visual.uv * [1, -1] + [0, 1], UVS, atol=1e-6)
    np.testing.assert_allclose(loaded.visual.vertex_attributes["color"][:, :3] / 255, COLORS, atol=1 / 255)
    material = loaded.visual.material
    for name in ("baseColorTexture", "metallicRoughnessTexture", "normalTexture", "occlusionTexture"):
        np.testing.assert_array_equal(np.asarray(getattr(material, name).convert("RGB")), TEXTURE)
    assert list(material.baseColorFactor) == [255] * 4  # it would tint the texture
    assert material.metallicFactor in (None, 1.0)  # it would dim the map
    assert not_held(look, ".glb") == ""


def test_grey_is_for_meshes_without_a_colour_alone():
    plain = load(".glb").visual.material.baseColorFactor
    assert list(load(".glb", Appearance(uvs=UVS)).visual.material.baseColorFactor) == list(plain) != [255] * 4
    assert list(load(".glb", Appearance(colors=COLORS)).visual.material.baseColorFactor) == [255] * 4


def test_textures_without_uvs_are_left_out():
    assert load(".glb", Appearance(textures={"texture": TEXTURE})).visual.material.baseColorTexture is None


def test_an_obj_holds_uvs_and_colours():
    lines = mesh_bytes(".obj", MESH, appearance=ALL).decode().splitlines()
    vertices = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    np.testing.assert_allclose(vertices[:, 3:], COLORS, atol=1e-4)
    np.testing.assert_allclose(load(".obj", ALL).visual.uv * [1, -1] + [0, 1], UVS, atol=1e-5)
    assert not_held(ALL, ".obj") == "textures"


def test_a_ply_holds_colours():
    np.testing.assert_allclose(load(".ply", ALL).visual.vertex_colors[:, :3] / 255, COLORS, atol=1 / 255)
    assert not_held(ALL, ".ply") == "UVs and textures"


@pytest.mark.parametrize("kind", [".stl", ".3mf"])
def test_files_for_printing_hold_the_shape_alone(kind):
    assert not_held(ALL, kind) == "UVs, textures and vertex colours"
    assert mesh_bytes(kind, MESH, appearance=ALL) == mesh_bytes(kind, MESH)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_changes_without_a_look(kind):
    assert mesh_bytes(kind, MESH, appearance=Appearance()) == mesh_bytes(kind, MESH)


def test_a_3mf_is_a_package_of_one_object_in_millimetres():
    with zipfile.ZipFile(io.BytesIO(mesh_bytes(".3mf", MESH))) as package:
        assert package.testzip() is None
        parts = {name: ElementTree.fromstring(package.read(name)) for name in package.namelist()}
    assert set(parts) == {"[Content_Types].xml", "_rels/.rels", "3D/3dmodel.model"}
    assert parts["_rels/.rels"][0].get("Target") == "/3D/3dmodel.model"
    model = parts["3D/3dmodel.model"]
    assert model.get("unit") == "millimeter"
    vertices = [[float(v.get(axis)) for axis in "xyz"] for v in model.iter(f"{{{CORE}}}vertex")]
    faces = [[int(t.get(corner)) for corner in ("v1", "v2", "v3")] for t in model.iter(f"{{{CORE}}}triangle")]
    np.testing.assert_allclose(vertices, MESH.vertices, rtol=1e-6)
    np.testing.assert_array_equal(faces, MESH.faces)
    (item,), (made,) = model.iter(f"{{{CORE}}}item"), model.iter(f"{{{CORE}}}object")
    assert item.get("objectid") == made.get("id")


def test_the_seams_of_a_texture_are_not_seen():
    ball = trimesh.creation.icosphere(2)
    corners = np.asarray(ball.triangles, np.float32).reshape(-1, 3)  # every edge is a seam
    normals = seamless_normals(corners, np.arange(len(corners)).reshape(-1, 3))
    np.testing.assert_allclose(normals, corners, atol=0.05)


@pytest.mark.parametrize(
    ("look", "message"),
    [
        ({"uvs": np.zeros((4, 3))}, r"expected finite uvs \(V, 2\), got \(4, 3\)"),
        ({"uvs": np.full((4, 2), np.nan)}, "expected finite uvs"),
        ({"colors": np.zeros(4)}, r"expected finite colors \(V, 3 or 4\), got \(4,\)"),
        ({"colors": np.full((4, 3), np.inf)}, "expected finite colors"),
        ({"textures": {"texture": np.zeros((0, 4, 3), np.uint8)}}, r"expected a texture \(H, W, 3\), got \(0, 4, 3\)"),
        ({"textures": {"normal_map": np.zeros((4, 4), np.uint8)}}, r"expected a normal_map \(H, W, 3\), got \(4, 4\)"),
    ],
)
def test_looks_of_another_shape_are_refused(look, message):
    with pytest.raises(ValueError, match=message):
        Appearance(**look)
