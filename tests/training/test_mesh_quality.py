"""Scores of meshes whose scores are known; the index that keeps them; lists of names chosen by them."""

import dataclasses
import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.images.surface_colors import SurfaceColors
from training import prepare_shapes
from training import score_meshes as script
from training.data.index_files import read_index, update_index
from training.data.name_lists import read_names
from training.data.shape_files import list_shapes, load_shape, shape_path
from training.data.shards import Shard
from training.mesh_jobs import AllFailedError, Failure
from training.mesh_quality import block_plates, score_mesh
from training.score_meshes import ScoreMeshesConfig
from training.select_meshes import Condition, SelectMeshesConfig
from training.select_meshes import main as select_meshes


def box(*sides, at=(0, 0, 0)):
    made = trimesh.creation.box(sides)
    made.apply_translation(at)
    return made


def together(*meshes):
    return trimesh.util.concatenate(meshes)


def scores_of(mesh, colors=None):
    return score_mesh(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces), colors)


def test_a_solid_is_closed_whole_and_thick():
    scores = scores_of(box(2, 1, 1))
    assert scores[:8] == (12, 1.0, 1.0, 0.0, 1, 1, 1.0, 0.0)  # faces to ground
    assert (scores.thin, scores.hidden, scores.textured, scores.colors) == (0, 0, 0, 0)
    assert scores.flat == pytest.approx(0.5) and scores.hull == pytest.approx(1)


def test_place_size_and_unwelded_or_unused_vertices_change_nothing():
    mesh = trimesh.creation.torus(1, 0.3)
    expected = scores_of(mesh)
    corners = np.concatenate([mesh.triangles.reshape(-1, 3) * 40 + [5, 6, 7], [[999, 0, 0]]])
    loose = trimesh.Trimesh(corners, np.arange(len(corners) - 1).reshape(-1, 3), process=False)
    np.testing.assert_allclose(scores_of(loose), expected, atol=2e-3)


def test_openings_and_turned_faces_are_seen():
    whole, opened = box(1, 1, 1), box(1, 1, 1)
    opened.faces = opened.faces[2:]
    apart = scores_of(together(whole, opened.apply_translation((3, 0, 0))))
    assert apart.open_area == pytest.approx(5 / 11) and apart.wound == 1
    assert apart.closed == pytest.approx(31 / 35)  # 13 of the 17 edges of the open box have two faces
    turned = box(1, 1, 1)
    turned.faces[0] = turned.faces[0, ::-1]
    assert scores_of(turned).wound == pytest.approx(15 / 18)


def test_several_objects_and_a_scene_on_a_plane_are_told_from_one_object():
    pair = scores_of(together(box(1, 1, 1), box(1, 1, 1, at=(3, 0, 0))))
    assert (pair.parts, pair.islands, pair.main) == (2, 2, pytest.approx(0.5, abs=0.01))
    touching = scores_of(together(box(1, 1, 1), box(1, 1, 1, at=(1.01, 0, 0))))
    assert (touching.parts, touching.islands, touching.main) == (2, 1, 1)
    scene = together(box(6, 0.05, 6), box(1, 1, 1, at=(0.5, 0.525, 0)), box(1, 2, 1, at=(-1.5, 1.025, 1)))
    assert scores_of(scene).ground > 0.9
    legs = [box(0.1, 1, 0.1, at=(x, 0.5, z)) for x in (-1, 1) for z in (-1, 1)]
    table = together(box(2, 0.1, 2, at=(0, 1, 0)), *legs)
    tray = together(box(2, 0.02, 2), box(2, 1, 0.1, at=(0, 0.5, 1)), box(2, 1, 0.1, at=(0, 0.5, -1)))
    column = together(box(1, 0.1, 1), box(0.9, 8, 0.9, at=(0, 4, 0)))
    assert max(scores_of(mesh).ground for mesh in (table, column, box(3, 0.1, 3))) < 0.3
    assert scores_of(tray).ground < 0.7  # open at two sides


def test_thin_plates_open_sheets_and_insides_are_measured():
    assert scores_of(box(1, 0.004, 1)).thin > 0.97 and scores_of(box(1, 0.02, 1)).thin < 0.05
    half = scores_of(together(box(1, 0.004, 1), box(1, 1, 1, at=(0, 2, 0))))
    assert half.thin == pytest.approx(2 / 8, abs=0.03)
    inside_out = box(1, 0.004, 1)
    inside_out.invert()
    assert scores_of(inside_out).thin > 0.97
    nested = scores_of(together(box(1, 1, 1), box(0.5, 0.5, 0.5)))
    assert nested.hidden == pytest.approx(1.5 / 7.5, abs=0.03) and nested.hull == pytest.approx(1.25)
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    flat = scores_of(sheet)
    assert (flat.flat, flat.hidden, flat.open_area, flat.hull) == (0, 0, 1, 0.5)


def test_colours_and_textures_are_measured():
    mesh = box(1, 1, 1)
    black_and_white = np.zeros((12, 3), np.uint8)
    black_and_white[::2] = 255
    scores = scores_of(mesh, black_and_white)
    assert scores.textured == 0 and scores.colors == pytest.approx(0.5, abs=0.02)
    assert scores_of(mesh, np.full((12, 3), 90, np.uint8)).colors < 1e-9
    board = Image.fromarray(np.array([[[0, 0, 0]] * 2 + [[255, 255, 255]] * 2], np.uint8))
    uv, texture = np.random.default_rng(0).random((12, 3, 2)), np.zeros(12, int)
    texture[6:] = -1
    scores = scores_of(mesh, SurfaceColors(np.full((12, 3, 3), 255), uv, texture, [board]))
    assert scores.textured == pytest.approx(0.5, abs=0.02) and 0.1 < scores.colors < 0.5


def test_plates_are_flat_regions_between_blocks():
    def in_voxels(mesh):  # of a grid of 64³, whose centre is a corner of blocks
        return mesh.vertices / 32, mesh.faces, 64

    assert block_plates(*in_voxels(box(16, 16, 32))) == (6, pytest.approx(2 * 16 * 16 + 4 * 16 * 32))
    assert block_plates(*in_voxels(box(16, 20, 32, at=(0.5, 0, 0)))) == (2, pytest.approx(2 * 16 * 20))  # only along z
    assert block_plates(*in_voxels(box(8, 8, 8, at=(4, 4, 4)))) == (6, pytest.approx(6 * 64))
    assert block_plates(*in_voxels(box(16, 7, 7))) == (0, 0)  # at most 49 voxels²
    pair = together(box(16, 16, 16, at=(-16, 0, 0)), box(16, 16, 16, at=(8, 0, 0)))
    assert block_plates(*in_voxels(pair)) == (12, pytest.approx(12 * 256))
    tilted = box(16, 16, 16)
    tilted.apply_transform(trimesh.transformations.rotation_matrix(0.02, (1, 1, 1)))
    assert block_plates(*in_voxels(tilted)) == (0, 0)
    assert block_plates(*in_voxels(trimesh.creation.icosphere(4, 24))) == (0, 0)


def test_what_has_no_surface_is_refused():
    with pytest.raises(ValueError, match="face with an area"):
        score_mesh(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]]))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A folder of a box and two boxes, scored in this process."""

    def run_engine(function, entries, config):
        for entry in entries:
            done.append(entry.name)
            yield entry, function(entry, config)

    done: list[str] = []
    monkeypatch.setattr(script, "run_engine", run_engine)
    (tmp_path / "meshes").mkdir()
    box(1, 2, 3).export(tmp_path / "meshes" / "box.ply")
    together(box(1, 1, 1), box(1, 1, 1, at=(3, 0, 0))).export(tmp_path / "meshes" / "pair.ply")
    return ScoreMeshesConfig(str(tmp_path / "meshes"), str(tmp_path / "data")), done


def test_scores_are_kept_beside_what_is_prepared_and_made_again_for_a_changed_mesh(config, tmp_path):
    config, done = config
    data = tmp_path / "data"
    assert script.main(config) == 2 and script.main(config) == 0 and done == ["box", "pair"]
    prepared = {"name": "box", "source": "meshes", "split": "train", "num_tokens": {"16": 9}, "checksums": {"16": "ab"}}
    update_index(data, Shard(), [prepared], lambda record: False)
    box_record, pair = read_index(data)
    assert box_record["num_tokens"] == {"16": 9} and box_record["scores"]["faces"] == 12 and pair["num_tokens"] == {}
    box(1, 2, 3).subdivide().export(tmp_path / "meshes" / "box.ply")
    # another task has the record in its own file then, and nothing is lost
    number = Shard.parse("0/2").has("box")
    assert script.main(dataclasses.replace(config, shard=f"{1 - number}/2")) == 1
    box_record, pair = read_index(data)
    assert box_record["scores"]["faces"] == 48 and box_record["num_tokens"] == {"16": 9}
    assert box_record["checksums"] == {"16": "ab"} and pair["scores"]["islands"] == 2
    assert len(json.loads((data / "index.json").read_text())) == 1


def test_a_list_of_names_is_chosen_by_conditions(config, tmp_path, capsys):
    config, _ = config
    script.main(config)
    names = tmp_path / "names.txt"
    choose = SelectMeshesConfig(str(tmp_path / "data"), str(names), "", ("main >= 0.9", "source in other, meshes"))
    assert select_meshes(choose) == ["box"] and read_names(names) == {"box"}
    assert "main >= 0.9: leaves out 1 of 2\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="got none of 2"):
        select_meshes(dataclasses.replace(choose, conditions=("licence = CC0-1.0",)))
    assert "leaves out 2 of 2, 2 of them without licence" in capsys.readouterr().err
    assert read_names(names) == {"box"}


def test_a_data_folder_of_the_chosen_shapes_has_links_and_an_index(config, tmp_path, monkeypatch):
    config, _ = config
    script.main(config)
    data, out = tmp_path / "data", tmp_path / "chosen"
    choose = SelectMeshesConfig(str(data), str(tmp_path / "names.txt"), str(out), ("main >= 0.9",))
    with pytest.raises(ValueError, match="run prepare_shapes"):
        select_meshes(choose)
    monkeypatch.setattr(prepare_shapes, "run_engine", script.run_engine)
    prepare_shapes.main(prepare_shapes.PrepareShapesConfig(config.meshes, str(data), (16,)))
    for _ in range(2):
        assert select_meshes(choose) == ["box"]
    assert list_shapes(data, "train", 16)[0] == ["box", "pair"] and list_shapes(out, "train", 16)[0] == ["box"]
    assert len(load_shape(shape_path(out, 16, "box")).block_coords) == list_shapes(out, "train", 16)[1][0]
    assert not (out / "views").exists()  # not rendered yet
    (out / "views").mkdir()
    (data / "views").mkdir()
    with pytest.raises(ValueError, match=r"expected no folder or a link to .*views, got another one"):
        select_meshes(choose)


def test_conditions():
    values = {"closed": 0.9, "licence": "CC BY 4.0", "tokens_256": 9}
    for text, holds in [
        ("closed >= 0.9", True), ("closed>0.9", False), ("closed != 1", True), ("tokens_256 <= 9", True),
        ("licence = CC BY 4.0", True), ("licence in CC0, CC BY 4.0", True), ("licence != CC0", True),
        ("missing > 0", False), ("missing != x", False), ("licence < 4", False),
    ]:  # fmt: skip
        assert Condition.parse(text).holds(values) == holds, text
    for text in ("closed", "closed >=", "closed >= much", ">= 3", "a ~ b"):
        with pytest.raises(ValueError, match="expected a"):
            SelectMeshesConfig(conditions=(text,))


def test_a_folder_whose_meshes_all_fail_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes" / "broken.ply").write_text("no mesh")
    failure = Failure("ValueError: expected a mesh")
    monkeypatch.setattr(script, "run_engine", lambda function, entries, config: ((e, failure) for e in entries))
    with pytest.raises(AllFailedError, match=r"all 1 meshes failed, see .*score_failures\.jsonl"):
        script.main(ScoreMeshesConfig(str(tmp_path / "meshes"), str(tmp_path / "data")))
