"""Training views: complete, reproducible, resumable, and as random as the config says."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.images.render import Camera, Light, MeshRenderer
from training import render_views
from training.config import load_config
from training.data.meshes import list_meshes
from training.data.shape_files import view_folder
from training.render_views import (
    MIN_COVERAGE,
    RenderViewsConfig,
    generator_for,
    main,
    random_camera,
    random_colors,
    random_light,
    render_mesh,
    render_view,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "meshes").mkdir()
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "meshes" / "box.ply")
    trimesh.creation.cone(1, 2).export(tmp_path / "meshes" / "cone.ply")
    return RenderViewsConfig(str(tmp_path / "meshes"), str(tmp_path / "data"), views=3, size=48, workers=1)


def pictures(config, name):
    folder = view_folder(config.data_dir, name)
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_script_writes_views_and_reports_bad_meshes(config, tmp_path):
    (tmp_path / "meshes" / "broken.ply").write_text("no mesh")
    failures = main(config)
    assert [f["name"] for f in failures] == ["broken"] and "expected a mesh" in failures[0]["error"]
    log = (tmp_path / "data" / "view_failures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == failures
    assert sorted(p.name for p in (tmp_path / "data" / "views").iterdir()) == ["box", "cone"]
    cameras = json.loads((view_folder(config.data_dir, "box") / "cameras.json").read_text())
    assert [v["file"] for v in cameras["views"]] == ["000.png", "001.png", "002.png"]
    images = pictures(config, "box")
    assert all(image.shape == (48, 48, 4) and (image[..., 3] > 0).mean() > 0.05 for image in images)

    # the camera in the file is the one that took the picture
    vertices = trimesh.creation.box((1, 2, 3)).vertices * (0.95 * 2 / 3)
    renderer = MeshRenderer(vertices, trimesh.creation.box().faces)
    for image, view in zip(images, cameras["views"], strict=True):
        again = renderer.render(Camera(**view["camera"]), 48, Light(**view["light"]), config.supersample)
        assert np.abs(image[..., 3].astype(int) - again[..., 3]).mean() < 1

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "views").rglob("*.png")}
    main(config)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "views").rglob("*.png")}


def test_missing_or_outdated_views_are_made_again(config):
    (entry, _) = list_meshes(config.meshes)
    assert render_mesh(entry, config) == 3
    first = pictures(config, "box")
    assert render_mesh(entry, config) == 0
    (view_folder(config.data_dir, "box") / "001.png").unlink()
    assert render_mesh(entry, config) == 3
    np.testing.assert_array_equal(first, pictures(config, "box"))
    assert render_mesh(entry, dataclasses.replace(config, seed=1)) == 3
    assert not np.array_equal(first, pictures(config, "box"))
    assert render_mesh(entry, dataclasses.replace(config, seed=1, workers=7, limit=1)) == 0


def test_views_that_are_cut_off_or_of_another_mesh_are_made_again(config):
    (entry, _) = list_meshes(config.meshes)
    folder = view_folder(config.data_dir, "box")
    assert render_mesh(entry, config) == 3
    good = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(good[:-30])
    assert render_mesh(entry, config) == 3 and (folder / "001.png").read_bytes() == good
    for damage in (b"", b"{", b"\xff", b"[]"):
        (folder / "cameras.json").write_bytes(damage)
        assert render_mesh(entry, config) == 3
    (folder / "001.png").write_bytes(good[:-30] + bytes([good[-30] ^ 1]) + good[-29:])
    assert render_mesh(entry, config) == 0
    assert render_mesh(entry, dataclasses.replace(config, verify=True)) == 3
    trimesh.creation.icosphere(subdivisions=1).export(entry.path)
    assert render_mesh(entry, config) == 3


def test_tasks_of_an_array_share_the_meshes_and_leave_each_other_s_files(config, capsys, monkeypatch):
    trimesh.creation.box().export(Path(config.meshes, "third.ply"))
    done = []

    def run_engine(function, entries, config):
        done.append([entry.name for entry in entries])
        yield from ((entry, 1) for entry in entries)

    monkeypatch.setattr(render_views, "run_engine", run_engine)
    views = view_folder(config.data_dir, "x").parent
    for name in (".box.11112222", ".other.11112222"):
        (views / name).mkdir(parents=True)
    for i in range(2):
        main(dataclasses.replace(config, shard=f"{i}/2"))
        assert (Path(config.data_dir) / f"view_failures.{i}-of-2.jsonl").is_file()
    assert sorted(done[0] + done[1]) == ["box", "cone", "third"]
    assert [path.name for path in views.iterdir()] == [".other.11112222"]


@pytest.mark.long
def test_a_mesh_that_exhausts_its_process_fails_alone(config, tmp_path, monkeypatch):
    """A mesh of 5.2 million faces, where a process may take little memory."""
    meshes = Path(config.meshes)
    (meshes / "cone.ply").unlink()
    sphere = trimesh.creation.icosphere(subdivisions=2)
    faces = np.tile(sphere.faces, (16_250, 1)).astype(np.uint32)
    np.savez(meshes / "huge.npz", v=sphere.vertices.astype(np.float32), f=faces)
    (tmp_path / "views.toml").write_text("views = 1\nsize = 32\nworkers = 1\n")
    arguments = f"{tmp_path}/views.toml meshes={meshes} data_dir={config.data_dir}"
    # numba and OpenBLAS reserve much address space for threads
    limits = f"ulimit -v 1300000; export OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1; exec {sys.executable}"
    command = ["bash", "-c", f"{limits} -m training.render_views {arguments}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in view_folder(config.data_dir, "x").parent.iterdir()] == ["box"]
    (failure,) = map(json.loads, (Path(config.data_dir) / "view_failures.jsonl").read_text().splitlines())
    assert failure["name"] == "huge" and "memory" in failure["error"]


def test_views_of_other_splits_meshes_and_numbers_share_nothing():
    keys = [(0, "train", "a", 0), (0, "test", "a", 0), (0, "train", "b", 0), (0, "train", "a", 1), (1, "train", "a", 0)]
    draws = {float(generator_for(*key).uniform()) for key in keys}
    assert len(draws) == len(keys)
    assert generator_for(*keys[0]).uniform() == generator_for(*keys[0]).uniform()


def test_cameras_and_lights_cover_their_ranges():
    config = RenderViewsConfig(elevation=(10, 40), azimuth=(-90, 90), focal_mm=(30, 100))
    rng = np.random.default_rng(0)
    cameras = [random_camera(config, rng) for _ in range(500)]
    for name, low, high in [("elevation", 10, 40), ("azimuth", -90, 90), ("focal_mm", 30, 100)]:
        values = [getattr(camera, name) for camera in cameras]
        margin = 0.03 * (high - low)
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
    lights = [random_light(config, camera, rng) for camera in cameras]
    assert all(abs(light.azimuth - camera.azimuth) <= 75 for light, camera in zip(lights, cameras, strict=True))
    assert np.mean([light.shadows for light in lights]) == pytest.approx(0.5, abs=0.07)


def test_the_default_lights_are_drawn_as_ever_and_a_tint_comes_after_them():
    camera = Camera(20, 30)
    light, rng = (
        random_light(RenderViewsConfig(), camera, generator_for(0, "train", "a", 0)),
        generator_for(0, "train", "a", 0),
    )
    ranges = [(20, 80), (-75, 75), (0.5, 0.95), (0.05, 0.2), (0.25, 0.45), (0.08, 0.2)]
    elevation, azimuth, *intensities = (rng.uniform(*limits) for limits in ranges)
    assert light == Light(elevation, 30 + azimuth, *intensities, shadows=rng.uniform() < 0.5)
    tinted = random_light(RenderViewsConfig(light_tint=0.2), camera, generator_for(0, "train", "a", 0))
    assert dataclasses.replace(tinted, key_color=(1.0, 1.0, 1.0), ambient_color=(1.0, 1.0, 1.0)) == light
    assert len({*tinted.key_color, *tinted.ambient_color}) == 6
    assert all(0.8 <= channel <= 1.2 for channel in (*tinted.key_color, *tinted.ambient_color))
    low = RenderViewsConfig(light_elevation=(-9, -5), light_azimuth=(170, 180), light_key=(2, 3), light_sky=(0, 0.1))
    other = random_light(low, camera, generator_for(0, "train", "a", 0))
    assert -9 <= other.elevation <= -5 and 200 <= other.azimuth <= 210 and 2 <= other.key <= 3 and other.sky <= 0.1


def test_views_of_an_older_version_are_kept_until_a_new_setting_changes_them(config):
    (entry, _) = list_meshes(config.meshes)
    assert render_mesh(entry, config) == 3
    file = view_folder(config.data_dir, "box") / "cameras.json"
    cameras = json.loads(file.read_text())
    for name in ("textures", "light_tint", "light_key"):
        del cameras["settings"][name]
    file.write_text(json.dumps(cameras))
    assert render_mesh(entry, config) == 0
    assert render_mesh(entry, dataclasses.replace(config, light_tint=0.1)) == 3


def test_textures_and_tinted_lights_are_seen_if_wanted(config):
    board = Image.fromarray(np.array([[[255, 0, 0]] * 2 + [[0, 255, 0]] * 2], dtype=np.uint8))
    sheet = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    sheet.visual = trimesh.visual.TextureVisuals(uv=[[0, 0], [1, 0], [1, 1], [0, 1]], image=board)
    sheet.export(Path(config.meshes, "sheet.glb"))
    front = dataclasses.replace(config, azimuth=(0, 0), elevation=(0, 0), views=1, light_fill=(0.5, 0.5))
    sides = []
    entry = next(entry for entry in list_meshes(config.meshes) if entry.name == "sheet")
    for textures in (False, True):
        assert render_mesh(entry, dataclasses.replace(front, textures=textures)) == 1
        (picture,) = pictures(config, "sheet")
        columns = picture[..., 3].any(axis=0).nonzero()[0]
        sides.append(picture[24, columns[[len(columns) // 4, -len(columns) // 4]]].astype(int))
    (plain_left, plain_right), (left, right) = sides
    assert min(plain_left[1], plain_right[0]) > 60  # each face has the mean of its corners
    assert left[0] > 120 and left[1] < 60 and right[1] > 120 and right[0] < 60
    assert render_mesh(entry, dataclasses.replace(front, textures=True, light_tint=0.3)) == 1
    (tinted,) = pictures(config, "sheet")
    assert not np.array_equal(tinted, picture) and np.array_equal(tinted[..., 3], picture[..., 3])


def test_colours_are_kept_and_greys_are_painted():
    rng = np.random.default_rng(0)
    painted = np.array([[200, 30, 30], [20, 100, 220]], dtype=np.uint8)
    shifted = random_colors(painted, 0.1, rng)
    assert shifted.shape == (2, 3) and (np.abs(shifted.astype(float) / painted - 1) < 0.13).all()
    np.testing.assert_array_equal(random_colors(painted, 0.0, rng), painted)
    red = np.array([[200, 30, 30]] * 2, dtype=np.uint8)
    assert len(random_colors(red, 0.1, rng)) == 2  # one colour, but a colour
    for colorless in (None, np.full((5, 3), 128, np.uint8)):
        drawn = np.array([random_colors(colorless, 0.1, rng) for _ in range(50)])
        assert drawn.shape == (50, 1, 3) and len(np.unique(drawn[:, 0], axis=0)) > 45


def test_a_sheet_seen_edge_on_is_looked_at_from_elsewhere():
    vertices = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]], dtype=np.float32)  # facing x
    renderer = MeshRenderer(vertices, np.array([[0, 1, 2], [0, 2, 3]]))
    config = RenderViewsConfig(size=64, azimuth=(-5, 5))
    for number in range(20):
        picture, *_ = render_view(renderer, None, config, generator_for(0, "train", "sheet", number))
        assert (picture[..., 3] > 0).mean() >= MIN_COVERAGE
    with pytest.raises(ValueError, match="covers"):
        never = dataclasses.replace(config, azimuth=(0, 0))
        render_view(renderer, None, never, generator_for(0, "train", "sheet", 0))


def test_shipped_configs_load():
    folder = Path(__file__).parents[2] / "training" / "configs"
    tiny = load_config(RenderViewsConfig, [str(folder / "tiny_views.toml"), "views=2"])
    assert (tiny.views, tiny.size) == (2, 256)
    paper = load_config(RenderViewsConfig, [str(folder / "paper" / "02_render_views.toml")])
    assert (paper.views, paper.size, paper.elevation) == (45, 1024, (10, 40))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="views >= 1"):
        RenderViewsConfig(views=0)
    with pytest.raises(ValueError, match="elevation"):
        RenderViewsConfig(elevation=(40, 10))
    with pytest.raises(ValueError, match="light_key"):
        RenderViewsConfig(light_key=(2.0, 1.0))
    with pytest.raises(ValueError, match="light_tint"):
        RenderViewsConfig(light_tint=1.0)


def test_point_maps_are_made_again_where_one_is_missing_or_damaged(config):
    (entry, _) = list_meshes(config.meshes)
    folder = view_folder(config.data_dir, "box")
    config = dataclasses.replace(config, points=16)
    assert render_mesh(entry, config) == 3 and render_mesh(entry, config) == 0
    assert [Image.open(file).size for file in sorted(folder.glob("*_points.png"))] == [(16, 16)] * 3
    good = (folder / "001_points.png").read_bytes()
    (folder / "001_points.png").unlink()
    assert render_mesh(entry, config) == 3
    (folder / "001_points.png").write_bytes(good[:-30] + bytes([good[-30] ^ 1]) + good[-29:])
    assert render_mesh(entry, config) == 0
    assert render_mesh(entry, dataclasses.replace(config, verify=True)) == 3
    assert (folder / "001_points.png").read_bytes() == good
    pictures = [file.read_bytes() for file in sorted(folder.glob("00?.png"))]
    assert render_mesh(entry, dataclasses.replace(config, points=0)) == 3
    assert [file.read_bytes() for file in sorted(folder.glob("*.png"))] == pictures
    with pytest.raises(ValueError, match="expected points >= 0, got -1"):
        dataclasses.replace(config, points=-1)


def test_rendering_does_without_torch():
    command = "import sys, training.render_views; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
