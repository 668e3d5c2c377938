"""prepare_shapes turns a folder into SDF files, alone or as an array; it reports bad meshes and keeps finished ones."""

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from safetensors.numpy import save_file

from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh
from tests.support.training_data import SPLITS, R, prepared
from training import prepare_shapes
from training.data.index_files import read_index
from training.data.meshes import split_of
from training.data.shape_files import DamagedFileError, list_shapes, load_shape, read_arrays, shape_path
from training.mesh_jobs import AllFailedError, MachineError, failure_of
from training.prepare_shapes import PrepareShapesConfig, main

ROOT = Path(__file__).parents[2]


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


def prepared_folder(tmp_path, *names: str, **changes) -> PrepareShapesConfig:
    """Write small meshes; return a config for them."""
    folder = tmp_path / "meshes"
    folder.mkdir(exist_ok=True)
    for place, name in enumerate(names):
        trimesh.creation.box((1, 1, 1 + 0.1 * place)).export(folder / f"{name}.ply")
    return PrepareShapesConfig(str(folder), str(tmp_path / "data"), (16,), workers=1, **changes)


def names_in(data_dir: str | Path) -> list[str]:
    return [record["name"] for record in read_index(data_dir)]


@pytest.fixture
def in_this_process(monkeypatch):
    """Prepare meshes without worker processes, which take seconds to start."""

    def run_engine(function, entries, config):
        for entry in entries:
            try:
                yield entry, function(entry, config)
            except (ValueError, OSError) as error:
                yield entry, failure_of(error)

    monkeypatch.setattr(prepare_shapes, "run_engine", run_engine)


def test_tasks_of_an_array_share_a_folder(tmp_path, in_this_process):
    names = [f"mesh_{i}" for i in range(9)]
    config = prepared_folder(tmp_path, *names)
    parts = [main(dataclasses.replace(config, shard=f"{i}/3")) for i in range(3)]
    assert sorted(record["name"] for part in parts for record in part) == names and sum(map(bool, parts)) > 1
    assert names_in(config.data_dir) == names and not Path(config.data_dir, "index.json").exists()
    assert list_shapes(config.data_dir, split_of(names[0]), 16)[0]

    # another number of tasks, and then one alone, list each mesh once
    main(dataclasses.replace(config, shard="1/2"))
    assert names_in(config.data_dir) == names
    assert sum(len(json.loads(file.read_text())) for file in Path(config.data_dir).glob("index*.json")) == 9
    main(config)
    assert [r["name"] for r in json.loads(Path(config.data_dir, "index.json").read_text())] == names


def test_two_runs_on_two_folders_of_meshes_keep_each_other_s_entries(tmp_path, in_this_process):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    first = dataclasses.replace(prepared_folder(one, "a", "b"), data_dir=str(tmp_path / "data"))
    second = dataclasses.replace(prepared_folder(two, "c"), data_dir=str(tmp_path / "data"))
    main(first), main(second)
    assert names_in(tmp_path / "data") == ["a", "b", "c"]
    (one / "meshes" / "a.ply").unlink()
    (one / "meshes" / "b.ply").write_text("no mesh")
    prepared_folder(one, "d")
    main(first)  # a is gone and b is bad now
    assert names_in(tmp_path / "data") == ["c", "d"]
    main(dataclasses.replace(first, resolutions=(24,)))
    assert read_index(tmp_path / "data")[1]["num_tokens"].keys() == {"16", "24"}


@pytest.mark.parametrize("shard", ["1", "2/2", "-1/2", "a/b", "0/0"])
def test_other_words_for_a_shard_are_refused(shard):
    with pytest.raises(ValueError, match="expected shard as i/n"):
        PrepareShapesConfig(shard=shard)


def test_files_of_other_settings_or_another_mesh_are_made_again(tmp_path, capsys, in_this_process):
    config = prepared_folder(tmp_path, "a", "b")
    main(config)
    paths = [shape_path(config.data_dir, 16, name) for name in "ab"]
    before = [path.read_bytes() for path in paths]
    changed = dataclasses.replace(config, scale=0.5, shell=0.9)
    (record, _) = main(changed)
    assert "2 files were made again" in capsys.readouterr().out
    assert all(path.read_bytes() != old for path, old in zip(paths, before, strict=True))
    assert record["num_tokens"]["16"] == len(load_shape(paths[0]).block_coords)
    main(changed)
    assert "made again" not in capsys.readouterr().out
    trimesh.creation.icosphere().export(Path(config.meshes, "b.ply"))
    main(changed)
    assert "1 files were made again" in capsys.readouterr().out

    names = ("block_coords", "sdf", "sharp")
    names = ("block_coords", "sdf", "sharp")
    arrays = dict(zip(names, read_arrays(paths[0], *names), strict=True))
    save_file(arrays, paths[0])  # as older versions wrote it
    main(changed)
    assert "1 files of an older version do not say their settings" in capsys.readouterr().out


def test_flipped_bits_are_found_by_verify(tmp_path, in_this_process):
    config = prepared_folder(tmp_path, "a")
    main(config)
    path = shape_path(config.data_dir, 16, "a")
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    with pytest.raises(DamagedFileError, match=r"a\.safetensors \(\w+ differs from its checksum\)"):
        load_shape(path)
    main(dataclasses.replace(config, verify=True))
    assert path.read_bytes() == good


def test_leftovers_of_killed_runs_are_removed_but_not_those_of_other_tasks(tmp_path, in_this_process):
    config = prepared_folder(tmp_path, "a", "a.b")
    own, other = (shape_path(config.data_dir, 16, "x").with_name(f".{n}.q1w2e3r4.safetensors") for n in ("a.b", "zz"))
    own.parent.mkdir(parents=True)
    own.touch(), other.touch()
    main(config)
    assert not own.exists() and other.exists()


def test_a_full_disk_is_an_error_that_keeps_the_index(tmp_path, monkeypatch, in_this_process):
    config = prepared_folder(tmp_path, "a", "b", "c")
    main(config)
    shape_path(config.data_dir, 16, "b").unlink()
    index = Path(config.data_dir, "index.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_shapes, "save_shape", full)
    with pytest.raises(MachineError, match="No space left on device"):
        main(config)
    assert names_in(config.data_dir) == ["a", "b", "c"]
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        main(config)
    assert Path(config.data_dir, "index.json").read_bytes() == index


def test_all_meshes_failed_is_an_error(tmp_path, in_this_process):
    config = prepared_folder(tmp_path)
    Path(config.meshes, "bad.ply").write_text("no mesh")
    with pytest.raises(AllFailedError, match=r"all 1 meshes failed, see .*failures\.jsonl"):
        main(config)


def test_a_damaged_index_is_moved_aside(tmp_path, capsys, in_this_process):
    config = prepared_folder(tmp_path, "a")
    main(config)
    index = Path(config.data_dir, "index.json")
    for damage in (index.read_bytes()[:-20], b"\xff", b"{}", index.read_bytes().replace(b"num_tok", b"num_tpk")):
        index.write_bytes(damage)
        with pytest.raises(ValueError, match=r"damaged index .*index\.json .*again with python -m training"):
            list_shapes(config.data_dir, "train", 16)
        main(config)
        assert names_in(config.data_dir) == ["a"] and index.with_name("index.json.damaged").read_bytes() == damage
        assert "moved to" in capsys.readouterr().err


def test_exit_codes_and_single_lines(tmp_path):
    """The script itself: all meshes bad, then a folder that cannot be written."""
    config = prepared_folder(tmp_path)
    Path(config.meshes, "bad.ply").write_text("no mesh")
    (tmp_path / "shapes.toml").write_text("resolutions = [16]\nworkers = 1\n")
    (tmp_path / "file").touch()
    for data_dir, message in ((config.data_dir, "error: all 1 meshes failed"), (tmp_path / "file", "error: [Errno")):
        arguments = [str(tmp_path / "shapes.toml"), f"meshes={config.meshes}", f"data_dir={data_dir}"]
        command = [sys.executable, "-m", "training.prepare_shapes", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message), done.stderr
        assert "Traceback" not in done.stderr


def test_no_meshes_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected meshes"):
        main(PrepareShapesConfig(str(tmp_path), str(tmp_path / "data")))
