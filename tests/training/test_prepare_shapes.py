"""prepare_shapes turns a folder into SDF files, reports bad meshes, and keeps finished ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh
from tests.support import mesh_that_kills
from tests.support.training_data import SPLITS, R, prepared
from training import prepare_shapes
from training.data.meshes import MeshEntry
from training.data.shape_files import load_shape, shape_path
from training.mesh_jobs import Failure
from training.prepare_shapes import PrepareShapesConfig, main, prepare_all


def test_files_hold_the_sdf_of_the_mesh(tmp_path_factory):
    data_dir = prepared(tmp_path_factory)
    index = json.loads((Path(data_dir) / "index.json").read_text())
    assert {record["name"]: record["split"] for record in index} == SPLITS
    vertices, faces = trimesh.creation.box((1.0, 0.6, 1.4)).vertices, trimesh.creation.box((1.0, 0.6, 1.4)).faces
    expected = mesh_to_sdf(normalize_mesh(vertices), faces, R)
    blocks, sdf, sharp = load_shape(shape_path(data_dir, R, "box"))
    assert np.array_equal(blocks, expected.block_coords) and np.array_equal(sharp, expected.sharp)
    np.testing.assert_allclose(sdf.astype(np.float32), expected.values, atol=2e-3)
    assert index[1]["name"] == "box" and index[1]["num_tokens"][str(R)] == len(blocks)


def test_own_folder_bad_meshes_and_second_run(tmp_path):
    folder = tmp_path / "meshes" / "sub"
    folder.mkdir(parents=True)
    trimesh.creation.icosphere(subdivisions=1).export(folder / "good.ply")
    (folder / "broken.obj").write_text("this is no mesh")
    (folder / "empty.stl").write_bytes(b"")
    config = PrepareShapesConfig(str(tmp_path / "meshes"), str(tmp_path / "data"), resolutions=(16, R), workers=1)
    records = main(config)
    assert [record["name"] for record in records] == ["sub__good"]
    assert set(records[0]["num_tokens"]) == {"16", str(R)} and records[0]["split"] in ("train", "val", "test")
    failures = [json.loads(line) for line in (tmp_path / "data" / "failures.jsonl").read_text().splitlines()]
    assert {failure["name"] for failure in failures} == {"sub__broken", "sub__empty"}
    assert all("ValueError: expected" in failure["error"] for failure in failures)

    kept, lost = shape_path(config.data_dir, 16, "sub__good"), shape_path(config.data_dir, R, "sub__good")
    before = kept.stat().st_mtime_ns
    lost.write_bytes(b"damaged")
    assert main(config) == records
    assert kept.stat().st_mtime_ns == before
    load_shape(lost)


def test_mesh_that_kills_its_process_is_a_failure_and_the_rest_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare_shapes, "prepare", mesh_that_kills.prepare)
    entries = [MeshEntry(name, tmp_path / name, "train", "test") for name in ("a", "bad", "huge", "cccc")]
    results = {e.name: result for e, result in prepare_all(entries, PrepareShapesConfig(workers=1))}
    assert results.pop("bad") == Failure("its process died with exit code 1 (out of memory?)")
    assert results.pop("huge") == Failure("out of memory")
    assert results == {name: {"16": len(name)} for name in ("a", "cccc")}


def test_no_meshes_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected meshes"):
        main(PrepareShapesConfig(str(tmp_path), str(tmp_path / "data")))
