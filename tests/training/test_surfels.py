"""Surfels lie evenly on the surface, with its normals and colours; their files are made once, whole."""

import dataclasses
import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.images.surface_colors import SurfaceColors
from training import sample_surfels as script
from training.config import load_config
from training.data.array_files import DamagedFileError, write_arrays
from training.data.surfels import DIRECTIONS, POINT_STEPS, read_surfels, sample_surfels, surfels_path
from training.sample_surfels import SampleSurfelsConfig, main

BOX = trimesh.creation.box((1.8, 0.9, 1.2))


def sampled(mesh=BOX, colors=None, number=6000):
    return sample_surfels(np.asarray(mesh.vertices), mesh.faces, colors, number, np.random.default_rng(0))


def test_points_lie_on_the_surface_evenly_and_fill_its_box():
    surfels = sampled()
    points, normals = surfels.points / POINT_STEPS, surfels.normals / 127
    half = np.array([0.9, 0.45, 0.6])
    np.testing.assert_allclose((abs(points) / half).max(1), 1, atol=1e-4)  # each on one of the six sides
    np.testing.assert_allclose([points.min(0), points.max(0)], [-half, half], atol=1 / POINT_STEPS)
    areas = np.array([half[1] * half[2], half[0] * half[2], half[0] * half[1]])
    shares = [(abs(normals[:, k]) > 0.9).mean() for k in range(3)]
    np.testing.assert_allclose(shares, areas / areas.sum(), atol=0.01)
    outward = np.einsum("ij,ij->i", points, normals)
    assert (outward > 0.4).all()


def test_a_narrow_spike_still_reaches_its_end():
    spike = trimesh.creation.cone(0.001, 0.95)  # few points fall on its upper part
    ball = trimesh.creation.icosphere(radius=0.5)
    surfels = sampled(trimesh.util.concatenate([ball, spike]), number=200)
    assert surfels.points[:, 2].max() == round(0.95 * POINT_STEPS)


def test_colours_are_those_of_faces_corners_or_textures():
    faces = np.random.default_rng(0).integers(0, 256, (len(BOX.faces), 3)).astype(np.uint8)
    surfels = sampled(colors=faces)
    np.testing.assert_array_equal(np.unique(surfels.colors, axis=0), np.unique(faces, axis=0))
    assert sampled().colors.shape == sampled(colors=np.full((12, 3), 90, np.uint8)).colors.shape == (0, 3)

    picture = Image.fromarray(np.repeat(np.array([[[250, 0, 0]], [[0, 0, 250]]], np.uint8), 2, 1))  # red above blue
    uv = (BOX.vertices[BOX.faces][..., :2] / [1.8, 0.9] + 0.5).astype(np.float32)
    textured = SurfaceColors(np.full((12, 3, 3), 255), uv, np.zeros(12, int), [picture])
    surfels = sampled(colors=textured)
    height = surfels.points[:, 1] / POINT_STEPS
    upper, lower = (surfels.colors[abs(height - middle) < 0.05] for middle in (0.225, -0.225))  # of the texels
    assert (upper[:, 0] > 200).all() and (upper[:, 2] < 110).all() and (lower[:, 2] > 200).all()


def test_a_mesh_without_area_is_refused():
    with pytest.raises(ValueError, match="expected triangles with an area, got none"):
        sample_surfels(np.eye(3), np.array([[0, 0, 1]]), None, 100, np.random.default_rng(0))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "meshes").mkdir()
    BOX.export(tmp_path / "meshes" / "box.ply")
    (tmp_path / "meshes" / "broken.ply").write_text("no mesh")
    records = [{"file": f"{name}.ply", "source": "made", "split": "train"} for name in ("box", "broken")]
    (tmp_path / "meshes" / "index.json").write_text(json.dumps(records))
    return SampleSurfelsConfig(str(tmp_path / "meshes"), str(tmp_path / "data"), number=500, workers=1)


def test_script_writes_files_once_and_reports_bad_meshes(config, monkeypatch):
    leftover, other = (surfels_path(config.data_dir, name) for name in (".box.0123", ".chair.0123"))
    leftover.parent.mkdir(parents=True)
    leftover.touch()  # of a run that was killed
    other.touch()  # of another task
    assert [failure["name"] for failure in main(config)] == ["broken"]
    path = surfels_path(config.data_dir, "box")
    assert len(read_surfels(path).points) == 500
    assert not leftover.exists() and other.exists()
    written = path.read_bytes()

    monkeypatch.setattr(script, "write_surfels", lambda *_: pytest.fail("written again"))
    entry = script.choose_meshes(config, config.splits)[1][0]
    assert not script.sample_mesh(entry, config)
    monkeypatch.undo()
    assert script.sample_mesh(entry, dataclasses.replace(config, number=400))
    assert len(read_surfels(path).points) == 400
    path.write_bytes(path.read_bytes()[:-1])
    assert script.sample_mesh(entry, config) and path.read_bytes() == written
    with pytest.raises(script.AllFailedError, match="all 1 meshes failed"):
        entry.path.unlink()
        path.unlink()
        main(dataclasses.replace(config, names=_names(config, "box")))


def _names(config, name):
    path = f"{config.data_dir}/names.txt"
    with open(path, "w") as file:
        file.write(name)
    return path


def test_deformed_copies_have_surfels_of_their_own(config):
    main(dataclasses.replace(config, deformed=2))
    copy = read_surfels(surfels_path(config.data_dir, "box~2"))
    assert abs(copy.points).max() == round(0.95 * POINT_STEPS)
    sides = np.ptp(copy.points, axis=0) / np.ptp(copy.points, axis=0).max()
    assert abs(sides - [1, 0.5, 2 / 3]).max() > 0.02


def test_impossible_settings_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"expected number > {len(DIRECTIONS)}, got 20"):
        SampleSurfelsConfig(number=20)
    with pytest.raises(ValueError, match="expected splits out of"):
        SampleSurfelsConfig(splits=("all",))
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"points": np.zeros((5, 3)), "normals": np.zeros((4, 3)), "colors": np.zeros((0, 3))})
    with pytest.raises(DamagedFileError, match="damaged file"):
        read_surfels(path)


def test_the_shipped_config_loads():
    assert load_config(SampleSurfelsConfig, ["training/configs/tiny_surfels.toml"]).number == 131072
