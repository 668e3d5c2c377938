"""Folders of meshes: their entries and splits, their triangles, and the errors for other files."""

import json
from collections import Counter

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.images.surface_colors import PLAIN, SurfaceColors
from training.data.meshes import MeshEntry, list_meshes, read_mesh, read_textured_mesh, split_of


def entry(path, **known):
    return MeshEntry(path.stem, path, "train", "test", **known)


def write_npz(path, **changes):
    vertices = np.array([[0, 0, 0], [65535, 0, 0], [0, 65535, 0], [0, 0, 65535]], dtype=np.uint16)
    faces = np.array([[0, 1, 2], [0, 2, 3]], dtype=np.uint16)
    arrays = {"v": vertices, "f": faces, "fc": np.array([1, 0], np.uint8), "pal": np.array([[9, 8, 7], [1, 2, 3]])}
    np.savez_compressed(path, **(arrays | changes))
    return path


def test_corpus_is_read_from_its_index(tmp_path):
    write_npz(tmp_path / "b.npz"), write_npz(tmp_path / "a.npz")
    record = {"source": "kenney", "split": "val", "has_color": False, "boundary_edges": 3}
    (tmp_path / "index.json").write_text(json.dumps([{"file": "b.npz", **record}, {"file": "a.npz", **record}]))
    first, second = list_meshes(tmp_path)
    assert first == MeshEntry("a", tmp_path / "a.npz", "val", "kenney", has_color=False, boundary_edges=3)
    assert second.name == "b" and second.components is None


def test_folder_is_searched_and_split_by_name(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    trimesh.creation.box().export(tmp_path / "deep" / "er" / "box.STL", file_type="stl")
    write_npz(tmp_path / "plain.npz")
    (tmp_path / "notes.txt").write_text("no mesh")
    listed = list_meshes(tmp_path)
    assert [e.name for e in listed] == ["deep__er__box", "plain"]
    assert [e.split for e in listed] == [split_of("deep__er__box"), split_of("plain")]
    assert {e.source for e in listed} == {tmp_path.name}


def test_splits_are_90_5_5():
    counts = Counter(split_of(f"mesh {i}") for i in range(4000))
    assert counts["train"] / 4000 == pytest.approx(0.9, abs=0.02)
    assert counts["val"] / 4000 == pytest.approx(0.05, abs=0.015)
    assert counts["test"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_npz_vertices_and_colours(tmp_path):
    path = write_npz(tmp_path / "m.npz")
    vertices, faces, colors = read_mesh(entry(path))
    np.testing.assert_allclose(vertices, [[-0.5, -0.5, -0.5], [0.5, -0.5, -0.5], [-0.5, 0.5, -0.5], [-0.5, -0.5, 0.5]])
    assert (vertices.dtype, faces.dtype, colors.dtype) == (np.float32, np.int64, np.uint8)
    np.testing.assert_array_equal(colors, [[1, 2, 3], [9, 8, 7]])
    assert read_mesh(entry(path, has_color=False))[2] is None
    floats = write_npz(tmp_path / "f.npz", v=np.array([[3.0, 0, 0], [0, 4, 0], [0, 0, 5], [1, 1, 1]]))
    np.testing.assert_allclose(read_mesh(entry(floats))[0][0], [3, 0, 0])


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl", "off"])
def test_mesh_files(tmp_path, suffix):
    box = trimesh.creation.box((1, 2, 3))
    box.export(tmp_path / f"box.{suffix}")
    vertices, faces, colors = read_mesh(entry(tmp_path / f"box.{suffix}"))
    read = trimesh.Trimesh(vertices, faces)
    assert read.is_watertight and read.volume == pytest.approx(6) and colors is None


def test_scene_parts_are_merged_with_their_places_and_colours(tmp_path):
    painted, plain, textured = (trimesh.creation.box() for _ in range(3))
    painted.visual.face_colors = [255, 0, 0, 255]
    green = trimesh.visual.material.PBRMaterial(baseColorFactor=[0, 255, 0, 255])
    plain.visual = trimesh.visual.TextureVisuals(material=green)
    picture = Image.new("RGB", (4, 4), (10, 200, 30))
    textured.visual = trimesh.visual.TextureVisuals(uv=np.full((8, 2), 0.5), image=picture)
    scene = trimesh.Scene()
    for x, part in enumerate((painted, plain, textured)):
        scene.add_geometry(part, transform=trimesh.transformations.translation_matrix((10 * x, 0, 0)))
    scene.export(tmp_path / "scene.glb")
    vertices, faces, colors = read_mesh(entry(tmp_path / "scene.glb"))
    assert len(faces) == 36
    place = np.round(vertices[faces].mean(axis=1)[:, 0] / 10).astype(int)
    for x, color in enumerate(([255, 0, 0], [0, 255, 0], [10, 200, 30])):
        assert (place == x).sum() == 12
        assert (np.abs(colors[place == x].astype(int) - color) <= 1).all()


def test_files_that_differ_by_their_suffix_alone_have_their_own_names_and_one_split(tmp_path):
    for suffix in ("obj", "stl"):
        trimesh.creation.box().export(tmp_path / f"chair.{suffix}")
    listed = list_meshes(tmp_path)
    assert [e.name for e in listed] == ["chair.obj", "chair.stl"]
    assert {e.split for e in listed} == {split_of("chair")}  # else a shape could be in two splits
    assert [len(read_mesh(e)[1]) for e in listed] == [12, 12]


def test_files_of_one_name_after_all_are_skipped_and_printed(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a" / "b.stl", tmp_path / "a__b.stl", tmp_path / "c.stl"):
        trimesh.creation.box().export(path)
    assert [e.name for e in list_meshes(tmp_path)] == ["a__b.stl", "c"]
    line = capsys.readouterr().err
    assert line.startswith("skipped ") and "a__b.stl" in line and line.count("\n") == 1


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_uv_without_a_texture_has_the_colour_of_the_material(tmp_path, suffix):
    box, red = trimesh.creation.box(), [204, 26, 26, 255]
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=red)
    box.visual = trimesh.visual.TextureVisuals(uv=np.linspace(0, 1, 16).reshape(8, 2), material=material)
    box.export(tmp_path / "box.glb")
    corners = "".join(f"v {x} {y} 0\nvt {x} {y}\n" for x, y in ((0, 0), (1, 0), (0, 1)))
    (tmp_path / "box.obj").write_text(f"mtllib red.mtl\n{corners}usemtl red\nf 1/1 2/2 3/3\n")
    (tmp_path / "red.mtl").write_text("newmtl red\nKd 0.8 0.1 0.1\n")
    _, faces, colors = read_mesh(entry(tmp_path / f"box.{suffix}"))
    assert len(faces) == {"glb": 12, "obj": 1}[suffix] and (np.abs(colors.astype(int) - red[:3]) <= 1).all()


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_textures_are_read_with_their_places_and_shared_by_parts(tmp_path, suffix):
    board = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], dtype=np.uint8))
    scene = trimesh.Scene()
    for x in range(2):
        part = trimesh.creation.box()
        if suffix == "glb":
            material = trimesh.visual.material.PBRMaterial(
                baseColorTexture=board.copy(), baseColorFactor=[255, 128, 0, 255]
            )
        else:
            material = trimesh.visual.material.SimpleMaterial(image=board.copy(), diffuse=[100, 100, 100, 255])
        part.visual = trimesh.visual.TextureVisuals(uv=np.linspace(0, 1, 16).reshape(8, 2), material=material)
        scene.add_geometry(part, transform=trimesh.transformations.translation_matrix((10 * x, 0, 0)))
    if suffix == "glb":
        scene.add_geometry(trimesh.creation.icosphere(0))  # has no texture
        scene.export(tmp_path / "scene.glb")
    else:
        text, beside = trimesh.exchange.obj.export_obj(scene, return_texture=True)
        (tmp_path / "scene.obj").write_text(text)
        for name, content in beside.items():
            (tmp_path / name).write_bytes(content)
    vertices, faces, colors = read_textured_mesh(entry(tmp_path / f"scene.{suffix}"))
    assert isinstance(colors, SurfaceColors) and len(colors.pyramids) == 1
    np.testing.assert_array_equal(colors.pyramids[0][0], np.asarray(board))
    textured = colors.texture != PLAIN
    assert textured.sum() == 24 and len(faces) == {"glb": 44, "obj": 24}[suffix]
    factor = {"glb": [255, 188, 0], "obj": [255, 255, 255]}[suffix]  # linear in glTF; 188 is half of the light
    assert np.abs(colors.corners[textured].reshape(-1, 3).astype(int) - factor).max() <= 1
    # each corner has the uv of its vertex
    local = vertices[faces][textured] - np.where(vertices[faces][textured][..., :1] > 5, [10.0, 0, 0], 0)
    box = trimesh.creation.box()
    place = np.abs(local[:, :, None] - box.vertices).sum(axis=-1).argmin(axis=-1)
    np.testing.assert_allclose(colors.uv[textured], np.linspace(0, 1, 16).reshape(8, 2)[place], atol=1e-5)


@pytest.mark.parametrize("suffix", ["glb", "ply"])
def test_colours_of_vertices_are_read_for_each_corner(tmp_path, suffix):
    ball = trimesh.creation.icosphere(1)
    ball.visual.vertex_colors = np.round((ball.vertices + 1) * 127).astype(np.uint8)
    ball.export(tmp_path / f"ball.{suffix}")
    vertices, faces, colors = read_textured_mesh(entry(tmp_path / f"ball.{suffix}"))
    expected = (vertices[faces] + 1) / 2
    if suffix == "glb":  # linear there
        expected = np.where(expected <= 0.0031308, 12.92 * expected, 1.055 * expected ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(colors.corners / 255, expected, atol=0.03)


def test_a_mesh_without_textures_has_face_colours_either_way(tmp_path):
    box = trimesh.creation.box()
    box.visual.face_colors = np.tile([[200, 10, 30, 255], [10, 200, 30, 255]], (6, 1))
    box.export(tmp_path / "box.ply")
    trimesh.creation.box().export(tmp_path / "plain.stl")
    write_npz(tmp_path / "m.npz")
    for name in ("box.ply", "plain.stl", "m.npz"):
        for one, other in zip(*(read(entry(tmp_path / name)) for read in (read_mesh, read_textured_mesh)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_meshes(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="found none"):
        list_meshes(tmp_path)
    for text in ("{", "[1]", '[{"file": "a.npz"}]', '{"file": "a.npz"}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="list of records"):
            list_meshes(tmp_path)
    (tmp_path / "index.json").write_text('[{"file": "a.npz", "source": "s", "split": "dev"}]')
    with pytest.raises(ValueError, match="expected a split"):
        list_meshes(tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file"):
        read_mesh(entry(tmp_path / "gone.npz"))
    for suffix in ("npz", "glb", "obj", "ply", "stl", "off"):
        (tmp_path / f"bad.{suffix}").write_bytes(b"not a mesh")
        with pytest.raises(ValueError, match=rf"expected a mesh in .*bad\.{suffix}"):
            read_mesh(entry(tmp_path / f"bad.{suffix}"))
    for changes, message in [
        ({"f": np.zeros((0, 3), np.uint16), "fc": np.zeros(0, np.uint8)}, "at least one triangle"),
        ({"f": np.full((2, 3), 4, np.uint16)}, r"in \[0, 4\)"),
        ({"v": np.full((4, 3), np.nan)}, "finite vertices"),
        ({"v": np.zeros((4, 2))}, "expected v"),
        ({"fc": np.array([0, 2], np.uint8)}, "cannot be read"),
        ({"fc": np.array([0], np.uint8)}, "each of 2 faces"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_mesh(entry(write_npz(tmp_path / "m.npz", **changes)))
