"""Deformed copies of training meshes, as prepare_shapes and render_views make them."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.training_data import SPLITS, write_meshes
from training.data.deformed_meshes import deform, name_of_copy
from training.data.index_files import read_index
from training.data.meshes import choose_meshes, read_mesh
from training.data.shape_files import load_shape, shape_path, view_folder
from training.prepare_shapes import PrepareShapesConfig
from training.prepare_shapes import main as prepare_shapes
from training.render_views import RenderViewsConfig
from training.render_views import main as render_views

R = 32
TRAIN = sorted(name for name, split in SPLITS.items() if split == "train")


def cylinder(rings: int = 41, sides: int = 16) -> np.ndarray:
    angle = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], 1)
    return np.concatenate([ring + np.array([3, y, 0]) for y in np.linspace(0, 2, rings)])


def test_a_copy_keeps_levels_and_symmetry():
    before = cylinder()
    after = deform(before, "can~1").astype(np.float64)
    rings = after.reshape(41, 16, 3)
    np.testing.assert_allclose(rings[..., 1], rings[:, :1, 1].repeat(16, 1), atol=1e-5)  # level stays level
    centre = (rings[:, :8] + rings[:, 8:]) / 2  # opposite points of a ring
    np.testing.assert_allclose(centre[..., 0], 3, atol=1e-5)  # what is upright stays upright
    np.testing.assert_allclose(centre[..., 2], 0, atol=1e-5)
    widths = np.ptp(rings[..., 0], axis=1)
    heights = np.linspace(-1, 1, 41)
    line = np.polynomial.Polynomial.fit(heights, widths, 2)
    np.testing.assert_allclose(line(heights), widths, atol=1e-4)
    assert np.ptp(widths) > 0.01
    assert after.dtype == np.float64 and deform(before, "can~1").dtype == np.float32


def test_a_copy_follows_from_its_name():
    before = cylinder()
    assert np.array_equal(deform(before, "can~1"), deform(before, "can~1"))
    assert not np.allclose(deform(before, "can~1"), deform(before, "can~2"), atol=1e-2)
    assert not np.allclose(deform(before, "can~1"), deform(before, "cup~1"), atol=1e-2)
    flat = before * [1, 0, 1]
    assert np.isfinite(deform(flat, "can~1")).all()
    assert name_of_copy("can", 0) == "can"


def test_shapes_and_views_of_copies_stand_beside_the_originals(tmp_path):
    meshes, data_dir = str(tmp_path / "meshes"), str(tmp_path / "data")
    write_meshes(tmp_path / "meshes")
    copies = [f"{name}~2" for name in TRAIN]
    for series in (0, 2, 2):
        records = prepare_shapes(
            PrepareShapesConfig(meshes=meshes, data_dir=data_dir, resolutions=(R,), deformed=series, workers=1)
        )
    assert sorted(record["name"] for record in records) == sorted([*copies, "pill"])
    assert {record["name"]: record["split"] for record in read_index(data_dir)} == SPLITS | dict.fromkeys(
        copies, "train"
    )
    assert [record["name"] for record in read_index(data_dir) if record.get("deformed") == 2] == copies

    for series in (0, 2):
        render_views(
            RenderViewsConfig(
                meshes=meshes, data_dir=data_dir, views=1, size=64, supersample=1, deformed=series, workers=1,
                elevation=(0, 0), azimuth=(0, 0), focal_mm=(200, 200),
            )
        )  # fmt: skip
    _, entries = choose_meshes(PrepareShapesConfig(meshes=meshes), deformed=2)
    for entry in (entry for entry in entries if entry.split == "train"):
        extent = np.ptp(read_mesh(entry)[0], axis=0)
        blocks, sdf, _ = load_shape(shape_path(data_dir, R, entry.name))
        block, *place = np.nonzero(sdf < 0)
        size = np.ptp(blocks[block] * 8 + np.stack(place, 1), axis=0) + 1.0
        assert np.abs(size / size.max() - extent / extent.max()).max() < 2 / R
        alpha = np.asarray(Image.open(view_folder(data_dir, entry.name) / "000.png"))[..., 3] > 0
        seen = [np.flatnonzero(alpha.any(axis)) for axis in (0, 1)]
        width, height = (rows[-1] - rows[0] + 1 for rows in seen)
        assert abs(width / height - extent[0] / extent[1]) < 0.15 * width / height
    cameras = json.loads((view_folder(data_dir, "pill") / "cameras.json").read_text())
    assert len(cameras["views"]) == 1

    for name in TRAIN:  # the copies are other shapes
        first, second = (load_shape(shape_path(data_dir, R, found))[1] for found in (name, f"{name}~2"))
        assert first.shape != second.shape or not np.array_equal(first, second)


def test_a_negative_series_is_refused(tmp_path):
    write_meshes(tmp_path / "meshes")
    with pytest.raises(ValueError, match="expected deformed as 0 or the number of a series, got -1"):
        prepare_shapes(PrepareShapesConfig(meshes=str(tmp_path / "meshes"), data_dir=str(tmp_path / "d"), deformed=-1))
