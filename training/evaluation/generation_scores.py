"""Scores, tables and the contact sheet of meshes made from single views, beside baselines that generate nothing.

Methods in the table:
    model            one sample per view
    nearest tokens   the training shape whose picture is the most similar by the image encoder's mean patch token
    nearest pixels   the same by plain pixels at 32 x 32
    mean shape       the mean training solid, cut where it agrees best with the training shapes
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from d3ds2.images.contact_sheet import contact_sheet
from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.storage.model_folder import SamplingConfig
from training.evaluation.score_tables import Column, format_summary, markdown_table, summarize, win_rate
from training.evaluation.shape_scores import (
    CLEANLINESS,
    F_DISTANCE,
    RESULT,
    TRUTH,
    Appearance,
    ScoreConfig,
    Shape,
    cleanliness,
    compare,
    topology,
)

MODEL, MEAN = "model", "mean shape"
NEAREST = {"tokens": "nearest tokens", "pixels": "nearest pixels"}
METHODS = (MODEL, *NEAREST.values(), MEAN)
COLUMNS = {
    "volume IoU ↑": Column("iou"),
    "CD ×10³ ↓": Column("chamfer", 1e3, 1, higher_is_better=False),
    f"F1 @ {F_DISTANCE} ↑": Column("f1"),
    "F1 @ 1 voxel ↑": Column("f1_voxel"),
}
TOPOLOGY = ("watertight", "outer_shells", "inner_shells", "tokens")
PICTURE = 192  # pixels per edge of a rendered result
OTHER_SIDE = 130.0  # degrees from the input's camera to the second picture's


@dataclass
class Item:
    """One view of one shape, the results for it, and their scores."""

    name: str
    source: str
    file: str  # of the view
    camera: Camera  # relative to the turned shape
    symmetry: int  # that turns the shape to the camera
    seed: int
    nearest: dict[str, tuple[str, int]] = field(default_factory=dict)  # by kind: training shape and symmetry
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # by method
    pictures: list[np.ndarray] = field(default_factory=list)  # for the contact sheet: input, result, truth
    appearances: dict[str, Appearance] = field(default_factory=dict)  # what networks look at
    learned: dict[str, dict[str, float]] = field(default_factory=dict)  # their scores of the result and the truth

    @property
    def record(self) -> dict:
        """The entry in evaluation.json."""
        known = asdict(self)
        keys = "name", "source", "file", "symmetry", "seed", "nearest", "scores", "learned"
        return {key: known[key] for key in keys}


def score_item(
    item: Item,
    block_coords: np.ndarray,
    values: np.ndarray,
    mean_mesh: tuple[np.ndarray, np.ndarray] | None,
    config: ScoreConfig,
    look: bool = False,
) -> Item:
    """Fill in the scores of the model and of the baselines that were asked, and if `look` what networks look at; return
    the item.

    Block coordinates (M,3) and SDF values (M,8,8,8) are the model's result. An item with a picture also gets pictures
    of result and truth, each from two sides.
    """
    truth = Shape.of_file(item.name, item.symmetry, config)
    result = Shape.of_blocks(block_coords, values, config, decoded=True)
    item.scores[MODEL] = compare(result, truth, config) | topology(result) | {"tokens": len(block_coords)}
    item.scores[MODEL] |= cleanliness(result, config)
    item.scores[TRUTH] = cleanliness(truth, config)
    for kind, (name, symmetry) in item.nearest.items():
        item.scores[NEAREST[kind]] = compare(Shape.of_file(name, symmetry, config), truth, config)
    if mean_mesh is not None:
        item.scores[MEAN] = compare(Shape(*mean_mesh, config), truth, config)
    if look:
        item.appearances = {RESULT: result.appearance(item.camera), TRUTH: truth.appearance(item.camera)}
    if item.pictures:
        item.pictures += [*pictures_of(result, item.camera), *pictures_of(truth, item.camera)]
    return item


def pictures_of(shape: Shape, camera: Camera) -> list[np.ndarray]:
    """Render the shape from the input's camera and from behind: two (PICTURE, PICTURE, 4) uint8."""
    if len(shape.faces) == 0:
        return [np.zeros((PICTURE, PICTURE, 4), dtype=np.uint8)] * 2
    renderer = MeshRenderer(shape.vertices, shape.faces)
    cameras = [camera, Camera(camera.elevation, camera.azimuth + OTHER_SIDE, camera.focal_mm)]
    lights = [Light(azimuth=c.azimuth + Light.azimuth, shadows=True) for c in cameras]
    return [renderer.render(c, PICTURE, light, supersample=2) for c, light in zip(cameras, lights, strict=True)]


def by_shape(items: list[Item], method: str, score: str) -> list[float]:
    """Average a score over the views of each shape, since intervals are drawn over shapes, not views."""
    values: dict[str, list[float]] = {}
    for item in items:
        values.setdefault(item.name, []).append(item.scores[method][score])
    return [float(np.mean(v)) for v in values.values()]


def methods_of(items: list[Item]) -> list[str]:
    """List the methods that were scored, in the order of the table."""
    return [method for method in METHODS if method in items[0].scores]


def summarize_items(items: list[Item]) -> dict:
    """Summarise every score of every method; for baselines also how often the model is better, and by how much."""
    summaries = {}
    for method in methods_of(items):
        summaries[method] = {c.score: summarize(by_shape(items, method, c.score)) for c in COLUMNS.values()}
        if method == MODEL:
            summaries[method] |= {s: summarize(by_shape(items, method, s)) for s in TOPOLOGY}
            summaries[method] |= {s: summarize(by_shape(items, method, s)) for s in CLEANLINESS}
            summaries[method] |= {f"true_{s}": summarize(by_shape(items, TRUTH, s)) for s in CLEANLINESS}
            continue
        for column in COLUMNS.values():
            ours, theirs = by_shape(items, MODEL, column.score), by_shape(items, method, column.score)
            summary: dict[str, Any] = summaries[method][column.score]
            summary["win_rate_of_model"] = win_rate(ours, theirs, column.higher_is_better)
            summary["model_minus_this"] = summarize(np.subtract(ours, theirs))
    return summaries


def report(
    items: list[Item],
    sampling: SamplingConfig,
    train_split: str,
    baselines: dict | None,
    config: ScoreConfig,
    split: str = "test",
    true_structure: bool = False,
) -> tuple[dict, str]:
    """Return the summaries for evaluation.json, and the tables in markdown.

    `split` is that of the items; `true_structure`: the model was given theirs.
    """
    summaries = summarize_items(items)
    made = summaries[MODEL]
    shapes = len({item.name for item in items})
    mirrored = ", of the mirrored picture too" if sampling.reads_mirrored() else ""
    filled = f", at least {sampling.least_inside:.0%} of it inside" if sampling.least_inside else ""
    structure = f"{sampling.structure_steps} steps, guidance {sampling.structure_guidance:g}{mirrored}"
    about = (
        f"{len(items)} views of {shapes} shapes of split {split}, {seen_in_training(split, train_split)}; one "
        f"sample per view. Structure: {'the true one' if true_structure else structure}; "
        f"latents: {sampling.latent_steps} steps, guidance {sampling.latent_guidance:g}; SDF smoothed "
        f"{sampling.surface_smoothing} times{filled}. Means with 95 % bootstrap intervals over shapes; IoU on "
        f"{config.cells}³ cells; distances in units of the cube [-1,1]³, one voxel is {2 / config.resolution:.5f}."
    )
    topology = (
        f"Model: {100 * made['watertight']['mean']:.0f} % watertight, {made['outer_shells']['mean']:.2f} outer and "
        f"{made['inner_shells']['mean']:.2f} inner shells, {made['tokens']['mean']:.0f} tokens."
    )
    paragraphs = ["## Generation from one view", about, score_table(summaries)]
    if baselines is not None:
        paragraphs += [win_table(summaries), source_table(items)]
        topology += (
            f" Baselines see the {baselines['shapes']} shapes of split {train_split}: {baselines['pictures']} "
            "pictures, mirrored ones included"
        )
        if "level" in baselines:
            topology += f"; the mean is cut at {baselines['level']:.3f}, IoU {baselines['iou_on_train']:.3f} there"
        topology += "."
    paragraphs.append(cleanliness_table(made))
    return summaries, "\n\n".join([text.strip("\n") for text in (*paragraphs, topology)]) + "\n"


def seen_in_training(split: str, train_split: str) -> str:
    """Say whether the shapes of a split were seen in training on `train_split`."""
    if split == train_split:
        return "the one the model was trained on, so the nearest training shape may be the shape itself"
    return f"none of them seen in training if the model was trained on split {train_split}"


def score_table(summaries: dict) -> str:
    """A table of every method's scores."""
    rows = [
        [method, *(format_summary(scores[c.score], c.scale, c.digits) for c in COLUMNS.values())]
        for method, scores in summaries.items()
    ]
    return markdown_table(["method", *COLUMNS], rows)


def win_table(summaries: dict) -> str:
    """A table of how often the model is better than each baseline."""
    rows = []
    for method in (method for method in METHODS[1:] if method in summaries):
        cells = [summaries[method][column.score] for column in COLUMNS.values()]
        rows.append([method, *(f"{100 * cell['win_rate_of_model']:.0f} %" for cell in cells)])
    return markdown_table(["model better than", *COLUMNS], rows)


def source_table(items: list[Item]) -> str:
    """A table of the volume IoU of the model and the baselines for each source of meshes."""
    rows, means = [], [MEAN] if MEAN in methods_of(items) else []
    for source in sorted({item.source for item in items}):
        group = [item for item in items if item.source == source]
        best = max(NEAREST.values(), key=lambda method: np.mean(by_shape(group, method, "iou")))
        cells = [format_summary(summarize(by_shape(group, method, "iou"))) for method in (MODEL, best, *means)]
        rows.append([f"{source} ({len({item.name for item in group})})", *cells])
    return markdown_table(["volume IoU by source", MODEL, "better of the nearest", *means], rows)


def cleanliness_table(made: dict) -> str:
    """A table of how clean the results are, beside the true shapes: median and mean."""
    rows = []
    for score, title in zip(CLEANLINESS, ("connected parts", "genus", "plates at block borders"), strict=True):
        cells = [f"{made[key]['median']:g}, {made[key]['mean']:.2f}" for key in (score, f"true_{score}")]
        rows.append([title, *cells])
    return markdown_table(["median, mean", MODEL, TRUTH], rows)


def sheet_of(items: list[Item], samples_per_row: int = 2, cell: int = 128) -> Image.Image | None:
    """Draw input, result and truth of the items that have pictures; None if none has."""
    drawn = [item for item in items if item.pictures]
    if not drawn:
        return None
    empty = [None] * len(drawn[0].pictures)
    rows, captions = [], []
    for first in range(0, len(drawn), samples_per_row):
        group = drawn[first : first + samples_per_row]
        row = [picture for item in group for picture in item.pictures]
        rows.append(row + empty * (samples_per_row - len(group)))
        texts = [f"{item.name}: IoU {item.scores[MODEL]['iou']:.2f}" for item in group]
        captions.append(texts + [""] * (samples_per_row - len(group)))
    labels = ["input", "result", "result, other side", "truth", "truth, other side"] * samples_per_row
    return contact_sheet(rows, labels, captions, cell)
