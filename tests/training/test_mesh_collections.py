"""Published collections, in small folders of the same layout: which meshes there are, and what is known of them."""

import gzip
import importlib.util
import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import trimesh

from training.data.mesh_collections import collection_of
from training.data.meshes import list_meshes, read_mesh, split_of
from training.data.name_lists import read_names, write_names
from training.prepare_shapes import PrepareShapesConfig
from training.prepare_shapes import main as prepare_shapes

with_parquet = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def write_mesh(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box((1, 2, 3)).export(path)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_objaverse(folder):
    for uid in ("aa11", "bb22"):
        write_mesh(folder / "glbs" / "000-007" / f"{uid}.glb")
    write_mesh(folder / "glbs" / "000-012" / "cc33.glb")
    paths = {uid: f"glbs/000-007/{uid}.glb" for uid in ("aa11", "bb22", "not-downloaded")}
    write_json(folder / "object-paths.json.gz", paths)
    chair = {
        "name": "A chair",
        "license": "by",
        "viewerUrl": "https://sketchfab.com/3d-models/aa11",
        "user": {"username": "ann", "displayName": "Ann"},
        "categories": [{"name": "furniture-home"}, {"name": "art"}],
    }
    plain = {"name": "", "license": None, "user": None, "categories": []}
    write_json(folder / "metadata" / "000-007.json.gz", {"aa11": chair, "bb22": plain})
    write_json(folder / "lvis-annotations.json.gz", {"lamp": ["bb22"], "mug": ["not-downloaded"]})


def test_objaverse(tmp_path):
    write_objaverse(tmp_path)
    assert collection_of(tmp_path) == "objaverse"
    entries = list_meshes(tmp_path, about=True)
    assert [entry.name for entry in entries] == ["aa11", "bb22", "cc33"]
    assert [entry.split for entry in entries] == [split_of(entry.name) for entry in entries]
    assert {entry.source for entry in entries} == {"objaverse"}
    url = "https://sketchfab.com/3d-models/aa11"
    about = {"title": "A chair", "licence": "by", "author": "Ann", "url": url, "category": "furniture-home, art"}
    assert [entry.about for entry in entries] == [about, {"category": "lamp"}, {}]
    assert len(read_mesh(entries[0])[1]) == 12
    assert not any(entry.about for entry in list_meshes(tmp_path))
    (tmp_path / "metadata" / "000-007.json.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(ValueError, match=r"damaged file .*000-007\.json\.gz"):
        list_meshes(tmp_path, about=True)


@with_parquet
def test_objaverse_xl(tmp_path):
    write_objaverse(tmp_path / "hf-objaverse-v1")
    commit = "https://github.com/ann/toys/blob/0123abc"
    files = ("ship.obj", "deep/My Boat.glb", "copy.obj", "old.blend", "gone.stl")
    for file in files[:3]:
        write_mesh(tmp_path / "github" / "repos" / "ann" / "toys" / file)
    write_mesh(tmp_path / "github" / "repos" / "ann" / "toys" / "not_annotated.obj")
    hashes = ("5a" * 32, "6b" * 32, "5a" * 32, "7c" * 32, "8d" * 32)
    rows = [
        {"fileIdentifier": f"{commit}/{file}", "sha256": sha256, "license": "MIT", "source": "github"}
        for file, sha256 in zip(files, hashes, strict=True)
    ]
    other = {"fileIdentifier": "https://github.com/bob/x/blob/9/y.obj", "sha256": "9e" * 32, "license": None}
    write_parquet(tmp_path / "github" / "github.parquet", [*rows, other | {"source": "github"}])
    museum = "https://3d-api.si.edu/content/document/3d_package:1/x.glb"
    exhibit = str(uuid.uuid5(uuid.NAMESPACE_DNS, museum))
    write_mesh(tmp_path / "smithsonian" / "objects" / f"{exhibit}.glb")
    write_parquet(tmp_path / "smithsonian" / "smithsonian.parquet", [{"fileIdentifier": museum, "license": "CC0"}])
    write_mesh(tmp_path / "thingiverse" / "thing-12-file-345.stl")
    thing = "https://www.thingiverse.com/thing:12/files?fileId=345"
    write_parquet(tmp_path / "thingiverse" / "thingiverse.parquet", [{"fileIdentifier": thing, "license": "CC BY"}])

    assert collection_of(tmp_path) == "objaverse-xl"
    entries = {entry.name: entry for entry in list_meshes(tmp_path, about=True)}
    ship, boat = hashes[:2]
    assert set(entries) == {"aa11", "bb22", "cc33", ship, boat, exhibit, "thing-12-file-345"}
    assert entries[boat].path == tmp_path / "github" / "repos" / "ann" / "toys" / "deep" / "My Boat.glb"
    assert entries[ship].about == {"licence": "MIT", "author": "ann", "url": f"{commit}/ship.obj"}
    assert entries[exhibit].about == {"licence": "CC0", "url": museum}
    assert entries["thing-12-file-345"].about == {"licence": "CC BY", "url": thing}
    sources = {"objaverse", "github", "smithsonian", "thingiverse"}
    assert {entry.source for entry in entries.values()} == sources
    assert all(len(read_mesh(entry)[1]) == 12 for entry in entries.values())
    assert set(entries) == {entry.name for entry in list_meshes(tmp_path)}
    (tmp_path / "github" / "github.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"damaged file .*github\.parquet"):
        list_meshes(tmp_path)


def test_annotations_without_pyarrow_say_what_to_install(tmp_path, monkeypatch):
    write_mesh(tmp_path / "github" / "repos" / "ann" / "toys" / "ship.obj")
    (tmp_path / "github" / "github.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[parquet\]"):
        list_meshes(tmp_path)


def test_shapenet_of_both_versions(tmp_path):
    write_mesh(tmp_path / "02691156" / "1a2b" / "models" / "model_normalized.obj")
    write_mesh(tmp_path / "02691156" / "3c4d" / "models" / "model_normalized.obj")
    write_mesh(tmp_path / "03001627" / "5e6f" / "model.obj")
    (tmp_path / "02691156" / "1a2b" / "models" / "model_normalized.solid.binvox").write_text("no mesh")
    planes = {"synsetId": "02691156", "name": "airplane,aeroplane,plane", "children": [], "numInstances": 2}
    write_json(tmp_path / "taxonomy.json", [planes, {"synsetId": "03001627", "name": "chair", "children": []}])
    (tmp_path / "all.csv").write_text("id,synsetId,subSynsetId,modelId,split\n1,02691156,02690373,1a2b,test\n")
    assert collection_of(tmp_path) == "shapenet"
    first, second, third = list_meshes(tmp_path, about=True)
    assert (first.name, first.split, first.about) == ("02691156_1a2b", "test", {"category": "airplane"})
    assert second.split == split_of(second.name) and third.about == {"category": "chair"}
    vertices, faces, _ = read_mesh(second)
    raw = trimesh.load(second.path, force="mesh", process=False)
    np.testing.assert_allclose(vertices[faces].mean(axis=(0, 1)), 0, atol=1e-6)
    front = raw.vertices[:, 2].argmin()  # what looked toward -Z looks toward +Z
    assert (np.abs(vertices - raw.vertices[front] * [-1, 1, -1]).sum(axis=1) < 1e-5).any()
    assert trimesh.Trimesh(vertices, faces).volume == pytest.approx(6)  # turned, not mirrored
    assert (second.turned, third.turned) == (True, False)


def test_a_source_can_be_named_and_an_unknown_one_is_refused(tmp_path):
    write_objaverse(tmp_path)
    assert len(list_meshes(tmp_path, "objaverse")) == 3
    assert list_meshes(tmp_path, "folder")[0].name == "glbs__000-007__aa11"
    with pytest.raises(ValueError, match="expected source of corpus, folder, objaverse"):
        list_meshes(tmp_path, "blendswap")
    with pytest.raises(ValueError, match="expected source of"):
        PrepareShapesConfig(source="blendswap")
    with pytest.raises(FileNotFoundError, match="found none of source shapenet"):
        list_meshes(tmp_path, "shapenet")


def test_names_select_meshes_and_what_was_prepared_before_stays(tmp_path, monkeypatch):
    from training import prepare_shapes as script

    monkeypatch.setattr(
        script, "run_engine", lambda function, entries, config: ((e, function(e, config)) for e in entries)
    )
    write_objaverse(tmp_path / "meshes")
    names = tmp_path / "names.txt"
    config = PrepareShapesConfig(str(tmp_path / "meshes"), str(tmp_path / "data"), (16,), names=str(names))
    for chosen in (["bb22", "not-downloaded"], ["cc33"]):
        write_names(names, chosen)
        prepare_shapes(config)
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    assert [record["name"] for record in index] == ["bb22", "cc33"]
    write_names(names, ["nobody"])
    with pytest.raises(ValueError, match=r"with names of .*names\.txt in .*, got none"):
        prepare_shapes(config)


def test_lists_of_names(tmp_path):
    file = tmp_path / "names.txt"
    write_names(file, ["b", "a"])
    assert file.read_text() == "a\nb\n" and read_names(file) == {"a", "b"}
    file.write_text("# chosen by eye\n\n a \n")
    assert read_names(file) == {"a"}
    for content in (b"# none\n", b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"on each line of .*names\.txt, got"):
            read_names(file)
    with pytest.raises(FileNotFoundError):
        read_names(Path(tmp_path, "missing"))
