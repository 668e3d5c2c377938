"""The evaluation: scores and baselines with known answers, and the whole script."""

import dataclasses
import json
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from d3ds2.geometry.voxels import Voxels
from d3ds2.images.render import Camera
from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf
from d3ds2.pipeline import load_pipeline
from tests.support.tiny_model import SAMPLING, write_model
from training.config import load_config
from training.data.meshes import MeshEntry, list_meshes
from training.data.shape_batches import pack_shapes
from training.data.shape_files import load_shape, shape_path
from training.data.symmetry import transform_vertices
from training.data.views import Pictures, Views, choose_views
from training.evaluate import EvaluateConfig, chosen_shapes, main
from training.evaluation import generation, round_trip
from training.evaluation.generation import GenerationConfig, make_baselines, seed_of
from training.evaluation.generation_scores import (
    MEAN,
    METHODS,
    MODEL,
    NEAREST,
    Item,
    by_shape,
    report,
    score_item,
    sheet_of,
)
from training.evaluation.learned_scores import LearnedScores, WeightsConfig
from training.evaluation.mean_solid import CELLS, packed_solid
from training.evaluation.shape_scores import TRUTH, ScoreConfig, Shape, cleanliness, compare, score_round_trip
from training.prepare_shapes import PrepareShapesConfig, prepare
from training.render_views import RenderViewsConfig, render_mesh

R = 64  # voxels per edge, so the latents are at 8³ and the edge of a voxel is 1/32
SPLITS = {"box": "train", "ball": "train", "wedge": "train", "box_again": "test", "other": "test"}


NO_WEIGHTS = LearnedScores(WeightsConfig(), {})


class Inline(Executor):
    """An executor that runs each job in this process as soon as it is submitted."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def make_meshes():
    box, wedge = trimesh.creation.box((1.0, 0.6, 1.6)), trimesh.creation.box((1.2, 0.8, 0.5))
    wedge.vertices[(wedge.vertices[:, 0] > 0) & (wedge.vertices[:, 1] > 0), 1] -= 0.7  # a ramp has no symmetry about x
    box.visual.face_colors, wedge.visual.face_colors = [200, 60, 40, 255], [60, 180, 90, 255]
    ball, other = trimesh.creation.icosphere(3), trimesh.creation.cone(0.5, 1.5)
    other.update_faces(np.arange(len(other.faces)) > 2)  # an open edge
    return {"box": box, "ball": ball, "wedge": wedge, "box_again": box, "other": other}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with meshes/ and their index, data/ with shapes at R and views, and model/ with random weights."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "meshes").mkdir()
    records = []
    for name, mesh in make_meshes().items():
        mesh.export(root / "meshes" / f"{name}.ply")
        defects = {"boundary_edges": 3 * (name == "other"), "nonmanifold_edges": 0, "components": 1}
        records.append({"file": f"{name}.ply", "source": "made" if name != "other" else "bought", **defects})
        records[-1]["split"] = SPLITS[name]
    (root / "meshes" / "index.json").write_text(json.dumps(records))
    shapes = PrepareShapesConfig(data_dir=str(root / "data"), resolutions=(R,))
    views = RenderViewsConfig(data_dir=str(root / "data"), views=4, size=64, azimuth=(-180, 180), supersample=1)
    shape_path(root / "data", R, "any").parent.mkdir(parents=True)
    index = []
    for entry in list_meshes(root / "meshes"):
        num_tokens = prepare(entry, shapes).num_tokens
        render_mesh(entry, views)
        index.append({"name": entry.name, "source": entry.source, "split": entry.split, "num_tokens": num_tokens})
    (root / "data" / "index.json").write_text(json.dumps(index))
    write_model(root / "model", structure_vae={"threshold": 0.65})  # few tokens
    return root


@pytest.fixture(scope="module")
def scoring(root):
    return ScoreConfig(str(root / "data"), R, num_points=2000, cells=64)


def quick_pipeline(root):
    pipeline = load_pipeline(root / "model")
    return dataclasses.replace(pipeline, sampling=dataclasses.replace(SAMPLING, latent_steps=1, latent_guidance=1.0))


def ball_blocks(radius, center=(0, 0, 0)):
    mesh = trimesh.creation.icosphere(4, radius)
    sdf = mesh_to_sdf(mesh.vertices + center, mesh.faces, R)
    return sdf.block_coords, sdf.values


def test_script_on_a_random_model(root, tmp_path):
    (tmp_path / "c.toml").write_text("num_points = 2000\ncells = 64\nworkers = 1\n[generation]\nbatch_size = 2\n")
    paths = [f"{key}={root / value}" for key, value in (("data_dir", "data"), ("model_dir", "model"))]
    overrides = [*paths, f"meshes={root / 'meshes'}", f"out_dir={tmp_path / 'out'}", "device=cpu"]
    sampling = ["sampling.structure_guidance=2", "sampling.latent_guidance=1", "sampling.latent_steps=1"]
    config = load_config(EvaluateConfig, [str(tmp_path / "c.toml"), *overrides, *sampling])
    result = main(config)

    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["sampling"]["structure_guidance"] == 2.0 and written["sampling"]["latent_steps"] == 1
    trips = written["round_trip"]
    assert [s["name"] for s in trips["scores"]] == ["box_again", "other"]
    assert set(trips["summaries"]) == {"bought", "made", "open edges", "any of these", "all"}
    assert trips["summaries"]["open edges"]["count"] == 1 and trips["summaries"]["all"]["count"] == 2
    # whatever the network does, the shell of mesh_to_sdf puts the target's surface 0.55 voxels outside the original
    box = next(s for s in trips["scores"] if s["name"] == "box_again")
    assert box["original_distance_of_target"] == pytest.approx(0.55 * 2 / R, rel=0.15)
    assert box["true_outer_shells"] == 1 and box["true_inner_shells"] == 0

    made = written["generation"]
    assert [s["name"] for s in made["scores"]] == ["box_again", "other"]
    for score in made["scores"]:
        assert set(score["scores"]) == {*METHODS, TRUTH}
        assert all(0 <= score["scores"][m]["iou"] <= 1 and score["scores"][m]["chamfer"] >= 0 for m in METHODS)
        assert score["scores"][MODEL]["watertight"] == 1
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for words in ("VAE round trip", "| nearest tokens |", "| mean shape |", "model better than", "| made (1) |"):
        assert words in text
    sheet = Image.open(tmp_path / "out" / "generation.png")
    assert sheet.width > 10 * 128 and len(sheet.getcolors(70000)) > 20
    assert result["generation"]["summaries"][MODEL]["iou"]["count"] == 2


def test_a_list_of_names_chooses_shapes(root, tmp_path):
    config = EvaluateConfig(data_dir=str(root / "data"), names=str(tmp_path / "names.txt"))
    every = chosen_shapes(EvaluateConfig(data_dir=str(root / "data")), R)
    (tmp_path / "names.txt").write_text(f"{every[0][-1]}\nnobody\n")
    names, tokens = chosen_shapes(config, R)
    assert names == every[0][-1:] and tokens.tolist() == every[1][-1:].tolist()
    (tmp_path / "names.txt").write_text("nobody\n")
    with pytest.raises(ValueError, match=r"^expected shapes of split test with names of .*names\.txt, got none in "):
        chosen_shapes(config, R)


def test_shipped_config_loads():
    path = Path(__file__).parents[2] / "training" / "configs" / "tiny_evaluate.toml"
    config = load_config(EvaluateConfig, [str(path), "limit=8", "generation.batch_size=2"])
    assert (config.split, config.limit, config.generation.batch_size) == ("test", 8, 2)
    with pytest.raises(ValueError, match="views_per_shape"):
        load_config(EvaluateConfig, [str(path), "generation.views_per_shape=0"])
    with pytest.raises(ValueError, match="parts"):
        load_config(EvaluateConfig, [str(path), 'parts=["all"]'])


def test_perfect_and_scaled_results(scoring):
    truth = Shape.of_blocks(*ball_blocks(0.7), scoring)
    perfect = compare(truth, truth, scoring)
    assert perfect["iou"] == 1 and perfect["f1"] == perfect["f1_voxel"] == 1 and perfect["chamfer"] < 1e-4
    smaller = compare(Shape.of_blocks(*ball_blocks(0.6), scoring), truth, scoring)
    shell = 0.55 * 2 / R
    assert smaller["iou"] == pytest.approx(((0.6 + shell) / (0.7 + shell)) ** 3, abs=0.01)
    assert smaller["chamfer"] == pytest.approx(0.1, abs=0.003) and smaller["f1_voxel"] == 0


def test_empty_results_are_scored_as_the_worst(scoring):
    blocks, values = ball_blocks(0.7)
    truth = Shape.of_blocks(blocks, values, scoring)
    for nothing in ((blocks[:0], values[:0]), (blocks, np.ones_like(values))):
        scores = compare(Shape.of_blocks(*nothing, scoring), truth, scoring)
        assert scores["iou"] == scores["f1"] == scores["f1_voxel"] == 0
        assert scores["chamfer"] == pytest.approx(0.7 + 0.55 * 2 / R, abs=0.005)


def test_cleanliness_counts_parts_tunnels_and_plates(scoring):
    ring, ball = trimesh.creation.torus(0.5, 0.2), trimesh.creation.icosphere(2, 0.2)
    assert cleanliness(Shape(ring.vertices, ring.faces, scoring), scoring) == {"bodies": 1, "genus": 1, "plates": 0}
    both = trimesh.util.concatenate([ring, ball])
    assert cleanliness(Shape(both.vertices, both.faces, scoring), scoring) == {"bodies": 2, "genus": 1, "plates": 0}
    box = trimesh.creation.box((1, 1, 1))  # its sides lie at block borders
    assert cleanliness(Shape(box.vertices, box.faces, scoring), scoring) == {"bodies": 1, "genus": 0, "plates": 6}
    nothing = Shape(np.zeros((0, 3)), np.zeros((0, 3)), scoring)
    assert cleanliness(nothing, scoring) == {"bodies": 0, "genus": 0, "plates": 0}


def test_round_trip_of_the_shape_itself_is_perfect(root, scoring):
    (entry,) = [e for e in list_meshes(root / "meshes") if e.name == "other"]
    sdf = mesh_to_sdf(*_normalized("other"), R)
    scores, _ = score_round_trip("other", sdf.block_coords, sdf.values, entry, scoring)
    assert scores["f1_voxel"] == 1 and scores["chamfer"] < 1e-3 and scores["watertight"] == 1
    assert scores["original_distance"] == pytest.approx(scores["original_distance_of_target"], rel=0.02)
    shifted, _ = score_round_trip("other", sdf.block_coords - [1, 0, 0], sdf.values, None, scoring)
    assert shifted["f1_voxel"] < 0.5 and "original_distance" not in shifted


def _normalized(name):
    mesh = make_meshes()[name]
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    return (mesh.vertices - (low + high) / 2) * (1.9 / (high - low).max()), mesh.faces


class Same:
    """A lossless VAE: the latent of a block is its SDF."""

    def __init__(self, batch):
        self.batch = batch

    def encode(self, sdf, voxels):
        assert len(sdf) == int((self.batch.sdf.abs() < 1).sum())
        return None, None, None

    def decode(self, latents, voxels):
        blocks = self.batch.block_coords
        place = torch.stack(torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij"), -1).reshape(1, 512, 3)
        xyz = (8 * blocks[:, None, 1:] + place).reshape(-1, 3)
        coords = torch.cat([blocks[:, :1].repeat_interleave(512, 0), xyz], 1).int()
        return self.batch.sdf.reshape(-1, 1), Voxels(coords, R, self.batch.batch_size)


def test_decoded_blocks_come_back_by_shape(root):
    names = ["box", "wedge"]
    shapes = [load_shape(shape_path(root / "data", R, name)) for name in names]
    decoded = round_trip.decode_again(Same(batch := pack_shapes(shapes, R)), batch)
    for (blocks, sdf, _), (coords, values) in zip(shapes, decoded, strict=True):
        np.testing.assert_array_equal(coords, blocks)
        np.testing.assert_array_equal(values, sdf)


def test_batches_keep_to_the_token_budget():
    tokens = np.array([5, 4, 3, 9, 20, 1])
    batches = list(round_trip.batches_of(list("abcdef"), tokens, 10))
    assert batches == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_groups_name_the_defects():
    path = Path("x")
    entries = {
        "a": MeshEntry("a", path, "test", "s", boundary_edges=2, nonmanifold_edges=0, components=1),
        "b": MeshEntry("b", path, "test", "s", boundary_edges=0, nonmanifold_edges=0, components=4),
        "c": MeshEntry("c", path, "test", "t", boundary_edges=0, nonmanifold_edges=0, components=1),
    }
    scores = [{"name": name} for name in "abc"]
    groups = round_trip.groups_of(scores, {"a": "s", "b": "s", "c": "t"}, entries)
    names = {label: "".join(s["name"] for s in group) for label, group in groups.items()}
    several = "several parts (may pass through each other)"
    assert names == {"s": "ab", "t": "c", "open edges": "a", several: "b", "any of these": "ab", "all": "abc"}
    assert "non-manifold edges" not in groups


# --- baselines


def test_packed_solid_reads_a_prepared_shape(root):
    bits = packed_solid(str(root / "data"), R, "box")
    volume = np.unpackbits(bits).sum() / CELLS**3 * 8
    sides = np.array([1.0, 0.6, 1.6]) * 1.9 / 1.6 + 2 * 0.55 * 2 / R
    assert volume == pytest.approx(sides.prod(), rel=0.05)


def test_nearest_view_finds_the_same_object(root, scoring):
    pipeline = quick_pipeline(root)
    config = GenerationConfig(batch_size=3, baseline_views=4)
    items, about = generation.run(pipeline, {"box_again": "made"}, config, 0, scoring, Inline(), NO_WEIGHTS)
    (item,) = items
    assert about["shapes"] == 3 and about["pictures"] == 3 * 4 * 2
    assert item.nearest["pixels"][0] == "box"
    assert len(item.pictures) == 5 and item.scores[MEAN]["iou"] > 0.2
    # the nearest picture shows the box just as the input does, so a right match needs the right turn
    assert item.scores[NEAREST["pixels"]]["iou"] > 0.9
    again = generation.run(pipeline, {"box_again": "made"}, config, 0, scoring, Inline(), NO_WEIGHTS)[0][0]
    assert again.record == item.record


def test_model_alone_has_the_same_scores(root, scoring):
    pipeline = quick_pipeline(root)
    config = GenerationConfig(batch_size=3, baseline_views=4, sheet=0)
    (whole,), about = generation.run(pipeline, {"box_again": "made"}, config, 0, scoring, Inline(), NO_WEIGHTS)
    alone, nothing = generation.run(
        pipeline, {"box_again": "made"}, dataclasses.replace(config, baselines=False), 0, scoring, Inline(), NO_WEIGHTS
    )
    assert about is not None and nothing is None and set(alone[0].scores) == {MODEL, TRUTH}
    assert alone[0].scores[MODEL] == whole.scores[MODEL]
    summaries, text = report(alone, pipeline.sampling, "train", None, scoring)
    assert set(summaries) == {MODEL} and "| model " in text and MEAN not in text


def test_training_views_find_themselves_turned_as_they_are(root, scoring):
    pipeline = load_pipeline(root / "model")
    config = GenerationConfig(batch_size=4, baseline_views=4)
    baselines = make_baselines(pipeline.image_encoder, config, 0, scoring, Inline())
    views = Views(str(root / "data"), baselines.names, 56, augment=False)
    chosen = choose_views(views, 4, 0)
    images = torch.cat([Pictures(views, chosen, 5)[i] for i in range(3)])
    assert len(images) == 12
    for found in baselines.nearest.find(pipeline.image_encoder, images).values():
        assert [(f.shape, f.view, f.symmetry) for f in found] == [tuple(c) for c in chosen]
    mirrored = baselines.nearest.find(pipeline.image_encoder, images.flip(-1))["pixels"]
    assert [(f.shape, f.view, f.symmetry) for f in mirrored] == [(c.shape, c.view, c.symmetry + 4) for c in chosen]


def test_a_model_is_scored_on_true_structures(root, scoring):
    pipeline, config = (
        quick_pipeline(root),
        GenerationConfig(batch_size=2, baselines=False, sheet=0, true_structure=True),
    )
    items, _ = generation.run(
        pipeline, {"other": "made", "box_again": "bought"}, config, 0, scoring, Inline(), NO_WEIGHTS
    )
    for item in items:
        blocks = load_shape(shape_path(scoring.data_dir, R, item.name)).block_coords
        assert item.scores[MODEL]["tokens"] == len(blocks)
    assert (
        "Structure: the true one; latents" in report(items, pipeline.sampling, "train", None, scoring, "test", True)[1]
    )


def make_item(name, ours, theirs, scoring):
    item = Item(name, "made", "000.png", Camera(), 0, 1, {"tokens": ("box", 0), "pixels": ("box", 0)})
    for method in METHODS:
        value = ours if method == MODEL else theirs
        item.scores[method] = {"iou": value, "chamfer": 1 - value, "f1": value, "f1_voxel": value / 2}
    item.scores[MODEL] |= {"watertight": 1.0, "outer_shells": 1, "inner_shells": 0, "tokens": 100}
    item.scores[MODEL] |= {"bodies": 2, "genus": 3, "plates": 4}
    item.scores[TRUTH] = {"bodies": 1, "genus": 0.5, "plates": 0}
    return item


def test_the_training_split_is_not_called_unseen(root, scoring):
    items, sampling = [make_item("a", 0.8, 0.5, scoring)], load_pipeline(root / "model").sampling
    seen, unseen = (report(items, sampling, "train", None, scoring, split)[1] for split in ("train", "val"))
    assert "1 shapes of split train, the one the model was trained on" in seen and "none of them" not in seen
    assert "1 shapes of split val, none of them seen in training if the model was trained on split train" in unseen


def test_report_counts_wins_and_differences(root, scoring):
    items = [make_item("a", 0.8, 0.5, scoring), make_item("b", 0.4, 0.5, scoring), make_item("c", 0.9, 0.5, scoring)]
    items.append(make_item("c", 0.7, 0.5, scoring))  # a second view of c
    assert by_shape(items, MODEL, "iou") == pytest.approx([0.8, 0.4, 0.8])
    sampling = load_pipeline(root / "model").sampling
    about = {"shapes": 3, "pictures": 6, "level": 0.5, "iou_on_train": 0.4}
    summaries, text = report(items, sampling, "train", about, scoring)
    assert summaries[MODEL]["iou"]["mean"] == pytest.approx(2 / 3)
    assert summaries[MEAN]["iou"]["win_rate_of_model"] == pytest.approx(2 / 3)
    assert summaries[MEAN]["chamfer"]["win_rate_of_model"] == pytest.approx(2 / 3)  # lower is better
    assert summaries[MEAN]["iou"]["model_minus_this"]["mean"] == pytest.approx(1 / 6)
    assert "| 67 % | 67 % | 67 % | 67 % |" in text and "4 views of 3 shapes" in text
    assert "| genus | 3, 3.00 | 0.5, 0.50 |" in text and "the mean is cut" in text
    for item in items:
        del item.scores[MEAN]
    without = report(items, sampling, "train", {"shapes": 3, "pictures": 6}, scoring)[1]
    assert MEAN not in without and "the mean is cut" not in without and "| made (3) |" in without


def test_scored_item_has_pictures_and_the_turned_truth(root, scoring):
    sdf = mesh_to_sdf(transform_vertices(_normalized("wedge")[0], 1), make_meshes()["wedge"].faces, R)
    item = Item("wedge", "made", "000.png", Camera(20, 10), 1, 0, {}, {}, [np.zeros((8, 8, 3), np.uint8)])
    mean = trimesh.creation.box((1, 1, 1))
    scored = score_item(item, sdf.block_coords, sdf.values, (mean.vertices, mean.faces), scoring)
    assert scored.scores[MODEL]["iou"] > 0.99  # a turned result against the truth turned alike
    assert len(scored.pictures) == 5
    result, truth = (scored.pictures[i].astype(int) for i in (1, 3))
    assert np.abs(result - truth).mean() < 1
    sheet = sheet_of([scored, make_item("x", 0, 0, scoring), scored, scored], samples_per_row=2, cell=32)
    assert sheet.width == 10 * 36 + 4  # three drawn samples in two rows
    assert sheet_of([make_item("x", 0, 0, scoring)]) is None
    empty = score_item(item, sdf.block_coords[:0], sdf.values[:0], (mean.vertices, mean.faces), scoring)
    assert empty.scores[MODEL]["iou"] == 0 and empty.scores[MODEL]["watertight"] == 0


def test_seeds_differ_by_view_and_do_not_move():
    seeds = {seed_of(s, name, file) for s in (0, 1) for name in "ab" for file in ("000.png", "001.png")}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a", "000.png") == seed_of(0, "a", "000.png")
