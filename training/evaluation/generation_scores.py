"""Meshes made from single views, beside what needs no generation: scores, tables and the contact sheet.

Methods in the table:
    model            one sample per view
    nearest tokens   the training shape whose picture is the most similar by the image encoder's mean patch token
    nearest pixels   the same by bare pixels at 32 x 32
    mean shape       the mean training solid, cut where it agrees best with the training shapes
"""

from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image

from d3ds2.images.contact_sheet import contact_sheet
from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.storage.model_folder import SamplingConfig
from training.evaluation.score_tables import format_summary, markdown_table, summarize, win_rate
from training.evaluation.shape_scores import F_DISTANCE, ScoreConfig, Shape, compare, topology

MODEL, MEAN = "model", "mean shape"
NEAREST = {"tokens": "nearest tokens", "pixels": "nearest pixels"}
METHODS = (MODEL, *NEAREST.values(), MEAN)
COLUMNS = {  # heading: (score, scale, digits, higher is better)
    "volume IoU ↑": ("iou", 1, 3, True),
    "CD ×10³ ↓": ("chamfer", 1e3, 1, False),
    f"F1 @ {F_DISTANCE} ↑": ("f1", 1, 3, True),
    "F1 @ 1 voxel ↑": ("f1_voxel", 1, 3, True),
}
TOPOLOGY = ("watertight", "outer_shells", "inner_shells", "tokens")
PICTURE = 192  # pixels per edge of a rendered result
OTHER_SIDE = 130.0  # degrees from the input's camera to the second picture's


@dataclass
class Item:
    """One view of one shape: what was made of it, and how it scores."""

    name: str
    source: str
    file: str  # of the view
    camera: Camera  # in the frame in which the shape is turned to it
    symmetry: int  # that turns the shape so
    seed: int
    nearest: dict[str, tuple[str, int]] = field(default_factory=dict)  # of each kind: training shape and symmetry
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # of each method
    pictures: list[np.ndarray] = field(default_factory=list)  # of the contact sheet: input, result, truth

    @property
    def record(self) -> dict:
        """For evaluation.json."""
        known = asdict(self)
        return {key: known[key] for key in ("name", "source", "file", "symmetry", "seed", "nearest", "scores")}


def score_item(
    item: Item,
    block_coords: np.ndarray,
    values: np.ndarray,
    mean_mesh: tuple[np.ndarray, np.ndarray] | None,
    config: ScoreConfig,
) -> Item:
    """Fill in the scores of all methods, the baselines' where they are known.

    An item with a picture also gets those of result and truth, each from two sides.
    """
    truth = Shape.of_file(item.name, item.symmetry, config)
    result = Shape.of_blocks(block_coords, values, config, decoded=True)
    item.scores[MODEL] = compare(result, truth, config) | topology(result) | {"tokens": len(block_coords)}
    for kind, (name, symmetry) in item.nearest.items():
        item.scores[NEAREST[kind]] = compare(Shape.of_file(name, symmetry, config), truth, config)
    if mean_mesh is not None:
        item.scores[MEAN] = compare(Shape(*mean_mesh, config), truth, config)
    if item.pictures:
        item.pictures += [*pictures_of(result, item.camera), *pictures_of(truth, item.camera)]
    return item


def pictures_of(shape: Shape, camera: Camera) -> list[np.ndarray]:
    """The shape from the input's camera and from behind: two (PICTURE, PICTURE, 4) uint8."""
    if len(shape.faces) == 0:
        return [np.zeros((PICTURE, PICTURE, 4), dtype=np.uint8)] * 2
    renderer = MeshRenderer(shape.vertices, shape.faces)
    cameras = [camera, Camera(camera.elevation, camera.azimuth + OTHER_SIDE, camera.focal_mm)]
    lights = [Light(azimuth=c.azimuth + Light.azimuth, shadows=True) for c in cameras]
    return [renderer.render(c, PICTURE, light, supersample=2) for c, light in zip(cameras, lights, strict=True)]


def by_shape(items: list[Item], method: str, score: str) -> list[float]:
    """One score for each shape, the mean over its views: shapes, not views, are what intervals are drawn over."""
    values: dict[str, list[float]] = {}
    for item in items:
        values.setdefault(item.name, []).append(item.scores[method][score])
    return [float(np.mean(v)) for v in values.values()]


def methods_of(items: list[Item]) -> list[str]:
    """Those that were scored, in the order of the table."""
    return [method for method in METHODS if method in items[0].scores]


def summarize_items(items: list[Item]) -> dict:
    """Of each method: each score's summary, and for the baselines how often the model is better, and by how much."""
    summaries = {}
    for method in methods_of(items):
        summaries[method] = {s: summarize(by_shape(items, method, s)) for s, *_ in COLUMNS.values()}
        if method == MODEL:
            summaries[method] |= {s: summarize(by_shape(items, method, s)) for s in TOPOLOGY}
            continue
        for score, _, _, higher in COLUMNS.values():
            ours, theirs = by_shape(items, MODEL, score), by_shape(items, method, score)
            summary = summaries[method][score]
            summary["win_rate_of_model"] = win_rate(ours, theirs, higher)
            summary["model_minus_this"] = summarize(np.subtract(ours, theirs))
    return summaries


def report(
    items: list[Item], sampling: SamplingConfig, train_split: str, baselines: dict | None, config: ScoreConfig
) -> tuple[dict, str]:
    """The summaries for evaluation.json, and the tables in markdown."""
    summaries = summarize_items(items)
    made = summaries[MODEL]
    shapes = len({item.name for item in items})
    about = (
        f"{len(items)} views of {shapes} shapes, none of which was in training; one "
        f"sample per view. Structure: {sampling.structure_steps} steps, guidance {sampling.structure_guidance:g}; "
        f"latents: {sampling.latent_steps} steps, guidance {sampling.latent_guidance:g}. Means with 95 % bootstrap "
        f"intervals over shapes; IoU on {config.cells}³ cells; distances in units of the cube [-1,1]³, one voxel is "
        f"{2 / config.resolution:.5f}."
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
            f"pictures, mirrored ones included; the mean is cut at {baselines['level']:.3f}, IoU "
            f"{baselines['iou_on_train']:.3f} there."
        )
    return summaries, "\n\n".join([text.strip("\n") for text in (*paragraphs, topology)]) + "\n"


def score_table(summaries: dict) -> str:
    """Every method's scores."""
    rows = [
        [method, *(format_summary(scores[s], scale, digits) for s, scale, digits, _ in COLUMNS.values())]
        for method, scores in summaries.items()
    ]
    return markdown_table(["method", *COLUMNS], rows)


def win_table(summaries: dict) -> str:
    """How often the model is better than each baseline."""
    rows = []
    for method in METHODS[1:]:
        cells = [summaries[method][score] for score, *_ in COLUMNS.values()]
        rows.append([method, *(f"{100 * cell['win_rate_of_model']:.0f} %" for cell in cells)])
    return markdown_table(["model better than", *COLUMNS], rows)


def source_table(items: list[Item]) -> str:
    """Volume IoU of the model and the baselines for each source of meshes."""
    rows = []
    for source in sorted({item.source for item in items}):
        group = [item for item in items if item.source == source]
        best = max(NEAREST.values(), key=lambda method: np.mean(by_shape(group, method, "iou")))
        cells = [format_summary(summarize(by_shape(group, method, "iou"))) for method in (MODEL, best, MEAN)]
        rows.append([f"{source} ({len({item.name for item in group})})", *cells])
    return markdown_table(["volume IoU by source", MODEL, "better of the nearest", MEAN], rows)


def sheet_of(items: list[Item], samples_per_row: int = 2, cell: int = 128) -> Image.Image | None:
    """Input, result and truth of the items that have pictures; None where none has."""
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
