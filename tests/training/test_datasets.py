"""(seed, step) alone determine a batch, with any number of workers; batches are packed and moved correctly."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from d3ds2.geometry.voxels import Voxels
from d3ds2.images.foreground import preprocess
from d3ds2.meshes.mesh_to_sdf import SparseSDF
from tests.support.training_data import R, prepared
from training.data.batch_plans import BatchPlan, ResolutionPlan, draw, plan_shapes
from training.data.damaged_files import DamagedFiles, TooManyDamagedError
from training.data.datasets import Shapes, Structures, StructureViews
from training.data.loading import load_batches
from training.data.shape_batches import pack_shapes
from training.data.shape_files import (
    StoredShape,
    list_shapes,
    load_shape,
    read_arrays,
    save_shape,
    shape_path,
    shape_weights,
)
from training.data.symmetry import facing, transform_grid
from training.data.views import Views

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepared(tmp_path_factory)


def dense(blocks, values):
    """Return blocks (M, 3) with values (M, 8, 8, 8) as a grid, with 2 where there is no block."""
    grid = np.full((R, R, R), 2.0)
    for (x, y, z), block in zip(blocks * 8, values, strict=True):
        grid[x : x + 8, y : y + 8, z : z + 8] = block
    return grid


def test_plan_shows_every_item_once_per_epoch_and_keeps_to_the_budget():
    tokens = draw(0).integers(1, 40, size=50)
    tokens[7] = 100
    plan = BatchPlan(tokens, batch_size=4, max_tokens=60, seed=3)
    batches = [plan[step] for step in range(200)]
    assert all(1 <= len(b) <= 4 and tokens[b].sum() <= 60 for b in batches)
    seen = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(seen[49 * epoch : 49 * (epoch + 1)]) == [i for i in range(50) if i != 7]
    sums = [tokens[b].sum() for b in batches]
    for i, (batch, following) in enumerate(itertools.pairwise(batches)):
        assert len(batch) == 4 or sums[i] + tokens[following[0]] > 60  # it ends only where the next is too much


def test_plan_is_a_function_of_seed_and_step():
    tokens = np.arange(1, 30)
    plan, other = BatchPlan(tokens, 3, 50, seed=1), BatchPlan(tokens, 3, 50, seed=2)
    forward = [plan[step].tolist() for step in range(60)]
    assert BatchPlan(tokens, 3, 50, seed=1)[43].tolist() == forward[43]
    assert plan[5].tolist() == forward[5]  # backwards again
    assert [other[step].tolist() for step in range(60)] != forward


def test_plan_without_fitting_items_is_an_error():
    with pytest.raises(ValueError, match="at most 5 tokens, the smallest has 6"):
        BatchPlan(np.array([6, 7]), 2, 5, seed=0)


def test_weighted_items_come_in_proportion():
    weights = np.array([0.0, 0.5, 1.0, 2.25])
    plan = plan_shapes(4, 3, seed=5, weights=weights)
    batches = [plan[step] for step in range(2000)]
    counts = np.bincount(np.concatenate(batches), minlength=4)
    assert all(len(batch) == 3 for batch in batches) and counts[0] == 0
    np.testing.assert_allclose(counts / counts[2], weights, atol=0.05)
    assert plan_shapes(4, 3, seed=5, weights=weights)[1234].tolist() == batches[1234].tolist()
    assert set(plan.others(1, 7)) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"expected weights of at least 0, some above, got 0.0 to 0.0"):
        plan_shapes(2, 1, seed=0, weights=np.zeros(2))


def test_weights_are_those_of_the_sources(data_dir):
    names, _ = list_shapes(data_dir, "train", R)
    assert shape_weights(data_dir, names, {}).tolist() == [1.0] * len(names)
    assert shape_weights(data_dir, names[:2], {"generated": 0.5}).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"expected sources of .* in source_weights, got \['bought'\]"):
        shape_weights(data_dir, names, {"bought": 2.0})


def test_resolutions_are_drawn_evenly_and_counted():
    plan = ResolutionPlan((256, 384, 512), seed=0)
    drawn = [plan[step] for step in range(5000)]
    for R_ in (256, 384, 512):
        assert [count for r, count in drawn if r == R_] == list(range(sum(r == R_ for r, _ in drawn)))
        assert 1500 < sum(r == R_ for r, _ in drawn) < 1850
    assert ResolutionPlan((256, 384, 512), seed=0)[4321] == drawn[4321]


@pytest.mark.parametrize("symmetry", range(8))
def test_moved_shape_is_the_moved_grid(data_dir, symmetry):
    path = shape_path(data_dir, R, "can")
    blocks, sdf, sharp = load_shape(path)
    moved_blocks, moved_sdf, moved_sharp = load_shape(path, symmetry)
    np.testing.assert_array_equal(dense(moved_blocks, moved_sdf), transform_grid(dense(blocks, sdf), symmetry))
    np.testing.assert_array_equal(dense(moved_blocks, moved_sharp), transform_grid(dense(blocks, sharp), symmetry))
    assert sharp.any() and sorted(map(tuple, moved_blocks)) == list(map(tuple, moved_blocks))


def test_shape_file_keeps_active_voxels_active(tmp_path):
    values = np.full((1, 8, 8, 8), -1.0, np.float32)
    values[0, 0, 0, :3] = [0.99999, -0.99999, 0.25]
    sharp = draw(0).random((1, 8, 8, 8)) < 0.5
    save_shape(tmp_path / "a.safetensors", SparseSDF(np.array([[1, 2, 3]], np.int32), values, sharp, 64, 2.0))
    blocks, loaded, loaded_sharp = load_shape(tmp_path / "a.safetensors")
    assert blocks.tolist() == [[1, 2, 3]] and np.array_equal(loaded_sharp, sharp)
    assert np.array_equal(np.abs(loaded) < 1, np.abs(values) < 1)
    np.testing.assert_allclose(loaded, values, atol=5e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_on_the_first_step(data_dir, workers):
    shapes = Shapes(data_dir, "train", (R,), 2, 10_000, seed=5, symmetries=(0, 3, 4))
    expected = [shapes[step] for step in range(6)]
    loaded = dict(zip(range(2, 6), load_batches(shapes, 2, 6, workers, CPU), strict=True))
    for step, batch in loaded.items():
        for a, b in zip(batch, expected[step], strict=True):
            for x, y in [(a.coords, b.coords), (a.neighbors, b.neighbors)] if isinstance(a, Voxels) else [(a, b)]:
                assert x is y is None or torch.equal(torch.as_tensor(x), torch.as_tensor(y))
    assert not torch.equal(expected[0].block_coords, expected[1].block_coords)


@pytest.fixture
def own_data(data_dir, tmp_path) -> str:
    """A copy of the data, which a test may damage."""
    return str(shutil.copytree(data_dir, tmp_path / "data"))


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 8
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def swap_blocks_of_an_older_file(path: Path) -> None:
    """Write a file without checksums, whose contents make no batch."""
    blocks, sdf, sharp = read_arrays(path, "block_coords", "sdf", "sharp")
    save_file({"block_coords": blocks[::-1].copy(), "sdf": sdf, "sharp": sharp}, path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "damage", [cut_off, Path.unlink, lambda p: flip_a_bit(p, -9), swap_blocks_of_an_older_file, Path.touch]
)
def test_a_damaged_shape_is_named_once_and_replaced(own_data, capfd, damage, workers):
    names, tokens = list_shapes(own_data, "train", R)
    arguments = own_data, "train", (R,), 2, 10_000, 5, (0, 3)
    whole = [Shapes(*arguments)[step] for step in range(8)]
    damaged = int(tokens.argmax())
    path = shape_path(own_data, R, names[damaged])
    damage(path)
    shapes = Shapes(*arguments)
    batches = list(load_batches(shapes, 0, 8, workers, CPU))
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped: " in line]
    if damage is Path.touch:
        assert not lines
    else:
        assert 1 <= len(lines) <= max(workers, 1) and f"{path}" in lines[0] and "training.prepare_shapes" in lines[0]
    for step, (batch, old) in enumerate(zip(batches, whole, strict=True)):
        is_same = torch.equal(batch.sdf, old.sdf) if batch.sdf.shape == old.sdf.shape else False
        assert batch.batch_size == 2 and len(batch.sdf) <= len(old.sdf)
        assert is_same == (damage is Path.touch or damaged not in shapes.plans[R][step] // 2)


def test_too_many_damaged_shapes_are_an_error_of_one_line(own_data):
    names, _ = list_shapes(own_data, "train", R)
    for name in names[:2]:
        cut_off(shape_path(own_data, R, name))
    for workers in (0, 1):
        with pytest.raises(
            TooManyDamagedError, match=r"^damaged file \S+ .*; 2 of 4 are damaged.*at most 1 "
        ) as caught:
            list(load_batches(Shapes(own_data, "train", (R,), 2, 10_000, seed=5), 0, 8, workers, CPU))
        assert "\n" not in str(caught.value)
    with pytest.raises(TooManyDamagedError, match="2 of 4 are damaged"):
        [Structures(own_data, names, R, batch_size=3, seed=0)[step] for step in range(2)]
    assert [DamagedFiles(n, "x").limit for n in (1, 8, 300, 452_000)] == [1, 1, 3, 100]


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_structures_are_the_same_from_memory_and_replace_a_damaged_shape(own_data, capsys, memory_gib):
    names, tokens = list_shapes(own_data, "train", R)
    arguments = own_data, names, R, 3, 0, (0, 6)
    whole = [Structures(*arguments)[step] for step in range(6)]
    held = Structures(*arguments, tokens, memory_gib)
    assert len(held.held) == (len(names) if memory_gib else 0)
    assert all(torch.equal(held[step], grids) for step, grids in enumerate(whole))
    cut_off(shape_path(own_data, R, names[2]))
    structures, again = Structures(*arguments, tokens, memory_gib), Structures(*arguments)
    for step, grids in enumerate(whole):
        assert torch.equal(structures[step], again[step])
        is_whole = torch.from_numpy(structures.plan[step] // 2 != 2)
        assert torch.equal(structures[step][is_whole], grids[is_whole])
    error = capsys.readouterr().err
    assert error.count("skipped: ") == 2 and names[2] in error  # of two datasets


def test_shapes_above_the_token_limit_are_counted(data_dir, capsys):
    _, tokens = list_shapes(data_dir, "train", R)
    Shapes(data_dir, "train", (R,), 2, int(tokens.max()) - 1, seed=0, symmetries=(0, 1))
    line = f"1 of 4 shapes at {R}³ have more than {tokens.max() - 1} tokens (up to {tokens.max()}): left out\n"
    assert capsys.readouterr().err == line
    Shapes(data_dir, "train", (R,), 2, int(tokens.max()), seed=0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("damage", [cut_off, lambda p: flip_a_bit(p, 90), Path.unlink])
def test_a_damaged_picture_is_named_and_replaced_by_another_of_its_shape(own_data, capsys, damage, cache):
    views = Views(own_data, ["box", "ball"], 28, augment=False)
    damage(views.files[0][0])
    views = Views(own_data, ["box", "ball"], 28, augment=False, cache=cache)
    shapes, mirrored = np.array([0, 1, 0, 0, 0]), np.array([0, 0, 1, 0, 1])
    symmetries, images = views.draw(shapes, mirrored, draw(2))
    assert capsys.readouterr().err.count("skipped: ") == 1
    good = preprocess(Image.open(views.files[0][1]), 28)
    assert torch.equal(images[0] / 255, good) and torch.equal(images[3] / 255, good)
    assert symmetries.tolist()[::2] == [views.turns[0][1], views.turns[0][1] + 4, views.turns[0][1] + 4]
    views.files[0][1].write_bytes(b"")
    with pytest.raises(TooManyDamagedError, match=r"(damaged picture|missing file) .*/box/00[01]\.png; 2 of 4"):
        Views(own_data, ["box", "ball"], 28).draw(shapes, mirrored, draw(2))


def test_a_damaged_list_of_pictures_is_named_and_left_out(own_data, capsys):
    names, _ = list_shapes(own_data, "train", R)
    cut_off(Path(own_data, "views", names[0], "cameras.json"))
    assert Views(own_data, names, 28).names == names[1:]
    assert "cameras.json" in capsys.readouterr().err
    Path(own_data, "views", names[1], "cameras.json").write_text("[]")
    with pytest.raises(TooManyDamagedError, match=r"cameras\.json .* 2 of 4"):
        Views(own_data, names, 28)


def test_packed_blocks_are_sorted_as_voxels(data_dir):
    batch = Shapes(data_dir, "train", (R,), 4, 10_000, seed=0, symmetries=(5,))[0]
    assert batch.batch_size == 4 and batch.resolution == R
    first_voxels = batch.block_coords * torch.tensor([1, 8, 8, 8], dtype=torch.int32)
    assert torch.equal(Voxels(first_voxels, R, 4).block_coords, batch.block_coords)


def test_structure_is_where_the_blocks_are(data_dir):
    names, tokens = list_shapes(data_dir, "train", R)
    structures = Structures(data_dir, names, R, batch_size=3, seed=0, symmetries=(0, 2, 6))
    for shape, symmetry in [(0, 0), (1, 2), (3, 6)]:
        occupancy = structures.occupancy(np.array([shape]), np.array([symmetry]))
        blocks, _, _ = load_shape(shape_path(data_dir, R, names[shape]), symmetry)
        assert occupancy.shape == (1, 1, R // 8, R // 8, R // 8) and occupancy.dtype == torch.uint8
        assert torch.equal(occupancy[0, 0].nonzero(), torch.from_numpy(blocks).long())
        assert occupancy.sum() == tokens[shape]
    assert structures[0].shape == (3, 1, R // 8, R // 8, R // 8)


def test_views_without_augmentation_are_the_preprocessed_picture(data_dir):
    views = Views(data_dir, ["box", "nothing"], 28, augment=False)
    assert views.names == ["box"]
    symmetries, images = views.draw(np.array([0, 0]), np.array([0, 1]), draw(0))
    assert images.shape == (2, 4, 28, 28) and images.dtype == torch.uint8
    candidates = [preprocess(Image.open(path), 28) for path in views.files[0]]
    assert any(torch.equal(images[0] / 255, picture) for picture in candidates)
    flipped = [preprocess(Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT), 28) for path in views.files[0]]
    assert any(torch.equal(images[1] / 255, picture) for picture in flipped)
    assert symmetries[0] < 4 <= symmetries[1] and set(symmetries) <= set(views.symmetries_of(0))


def test_symmetry_of_a_view_brings_its_camera_to_the_front(data_dir):
    turned, fixed = Views(data_dir, ["box"], 28), Views(data_dir, ["box"], 28, turn_to_camera=False)
    assert fixed.symmetries_of(0) == [0, 4]
    assert turned.turns[0] == [facing(azimuth)[0] for azimuth in azimuths(data_dir)]


def azimuths(data_dir):
    views = json.loads((Path(data_dir) / "views" / "box" / "cameras.json").read_text())["views"]
    return [view["camera"]["azimuth"] for view in views]


def test_cached_views_are_the_same_and_augmentation_varies(data_dir):
    names, _ = list_shapes(data_dir, "train", R)
    cached, read = Views(data_dir, names, 42, cache=True), Views(data_dir, names, 42)
    shapes, mirrored = np.array([0, 1, 2, 3] * 8), np.array([0, 1] * 16)
    a, b = cached.draw(shapes, mirrored, draw(1)), read.draw(shapes, mirrored, draw(1))
    assert np.array_equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert len(torch.unique(a[1], dim=0)) > 12  # without augmentation, four shapes have 8 views
    assert (a[1][:, 3] > 0).flatten(1).any(1).all()  # the object is in every picture


def test_view_batches_repeat_shapes(data_dir):
    names, _ = list_shapes(data_dir, "train", R)
    dataset = StructureViews(Views(data_dir, names, 28), batch_size=6, views_per_shape=2, seed=0)
    batch = dataset[4]
    assert batch.shapes[0::2].tolist() == batch.shapes[1::2].tolist() and batch.images.shape == (6, 4, 28, 28)
    assert torch.equal(dataset[4].images, batch.images)
    with pytest.raises(ValueError, match="divisible by views_per_shape 4, got 6"):
        StructureViews(Views(data_dir, names, 28), batch_size=6, views_per_shape=4, seed=0)


def test_missing_data_is_named(tmp_path, data_dir):
    with pytest.raises(FileNotFoundError, match=r"index\.json; make it with python -m training\.prepare_shapes"):
        list_shapes(tmp_path, "train", R)
    with pytest.raises(ValueError, match="split 'trian' at resolution 32"):
        list_shapes(data_dir, "trian", R)
    with pytest.raises(FileNotFoundError, match=r"make them with python -m training\.render_views"):
        Views(str(tmp_path), ["box"], 28)


@pytest.mark.parametrize(
    ("blocks", "sdf", "message"),
    [
        pytest.param([[0, 0, 1], [0, 0, 0]], 0.5, "lexicographic", id="out-of-order"),
        pytest.param([[0, 0, 1], [0, 0, 1]], 0.5, "different blocks", id="twice"),
        pytest.param([[0, 0, 1], [0, 0, 4]], 0.5, "invalid entry", id="outside-the-grid"),
        pytest.param([[0, 0, 1], [0, 0, 2]], -1.0, "active voxel", id="nothing-in-the-band"),
    ],
)
def test_bad_blocks_are_named(blocks, sdf, message):
    values = np.full((2, 8, 8, 8), sdf, dtype=np.float16)
    with pytest.raises(ValueError, match=message):
        pack_shapes([StoredShape(np.array(blocks, dtype=np.int16), values, values > 0)], 32)
