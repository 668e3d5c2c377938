"""Scores by networks of others, whose weights the user gives: Normal-FID, CLIP similarity, and the alignment of a shape
with its picture by ULIP-2, Uni3D and OpenShape.

A score whose weights are not given is left out, and the report names the key that gives them. Alignment is the cosine
of the input picture's vector and that of POINTS points of the shape; CLIP similarity that of the input picture and a
render of the shape from the same camera. Each is also computed for
the true shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.evaluation.fid import features_of, frechet_distance, load_inception
from training.evaluation.image_towers import ImageTower, load_clip, load_eva
from training.evaluation.normal_pictures import on_white
from training.evaluation.point_encoders import (
    load_openshape,
    load_ulip2,
    load_uni3d,
    prepare_points,
)
from training.evaluation.score_tables import format_summary, markdown_table, summarize
from training.evaluation.shape_scores import RESULT, TRUTH, Appearance


@dataclass(frozen=True)
class WeightsConfig:
    """Files and folders with weights of other networks; "": the scores that need them are left out."""

    inception: str = ""  # file: Normal-FID
    clip: str = ""  # folder of transformers: CLIP similarity of renders
    ulip2: str = ""  # checkpoint, with clip_bigg
    uni3d: str = ""  # checkpoint, with eva_clip
    openshape: str = ""  # checkpoint of PointBERT, with clip_bigg
    clip_bigg: str = ""  # folder of transformers: OpenCLIP's ViT-bigG-14, which sees the pictures for two of these
    eva_clip: str = ""  # file of open_clip: EVA02-E-14-plus, which sees them for Uni3D

    def __post_init__(self):
        for name, tower in TOWER_OF.items():
            if getattr(self, name) and not getattr(self, tower):
                raise ValueError(f"weights.{name} needs weights.{tower}, which encodes the pictures")

    @property
    def wants_shapes(self) -> bool:
        """Whether any score of a shape is asked for."""
        return any(getattr(self, name) for name in ("inception", "clip", *TOWER_OF))


TOWER_OF = {"ulip2": "clip_bigg", "uni3d": "eva_clip", "openshape": "clip_bigg"}
Z_UP = {"openshape"}
NAMES = {"clip": "CLIP similarity", "ulip2": "ULIP-2", "uni3d": "Uni3D", "openshape": "OpenShape"}
FID = "Normal-FID"
LOADERS: dict[str, Callable[[str], nn.Module]] = {
    "ulip2": load_ulip2,
    "uni3d": load_uni3d,
    "openshape": load_openshape,
}


@dataclass
class LearnedScores:
    """The networks, and what they have found so far.

    Attributes:
        networks: by the key of `WeightsConfig`.
        features: of normals, by method.
    """

    config: WeightsConfig
    networks: dict[str, Any]
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def load(cls, config: WeightsConfig, device: torch.device, dtype: torch.dtype) -> "LearnedScores":
        """Load all networks whose weights are given.

        Raises:
            ValueError: a file is damaged or of another network.
            OSError: it cannot be read.
            ImportError: a library is missing.
        """
        networks: dict[str, Any] = {}
        if config.inception:
            networks["inception"] = load_inception(config.inception, device)
        for name in ("clip", "clip_bigg"):
            if folder := getattr(config, name):
                networks[name] = load_clip(folder, device, dtype)
        if config.eva_clip:
            networks["eva_clip"] = load_eva(config.eva_clip, device, dtype)
        for name, load in LOADERS.items():
            if file := getattr(config, name):
                networks[name] = load(file).to(device)
        return cls(config, networks)

    @torch.no_grad()
    def add(self, picture: np.ndarray | None, shapes: dict[str, Appearance]) -> dict[str, dict[str, float]]:
        """Score shapes by method, made for a picture (S, S, 3) uint8; None without one. Returns scores by method."""
        found: dict[str, dict[str, float]] = {method: {} for method in shapes}
        vectors = {} if picture is None else self._vectors(picture)
        for method, shape in shapes.items():
            if "inception" in self.networks:
                self.features.setdefault(method, []).append(features_of(self.networks["inception"], shape.normals))
            for name in NAMES:
                if name in self.networks and picture is not None:
                    found[method][name] = self._similarity(name, vectors, shape)
        return found

    def fid(self) -> float:
        """The distance of the results' normals to the true ones, over all shapes so far."""
        return frechet_distance(*(np.concatenate(self.features[name]) for name in (RESULT, TRUTH)))

    def _vectors(self, picture: np.ndarray) -> dict[str, Tensor]:
        towers = {name: network for name, network in self.networks.items() if isinstance(network, ImageTower)}
        return {name: tower(self._pixels(tower, picture)) for name, tower in towers.items()}

    @staticmethod
    def _pixels(tower: ImageTower, picture: np.ndarray) -> Tensor:
        return torch.from_numpy(picture).to(tower.mean.device).movedim(-1, 0)[None] / 255

    def _similarity(self, name: str, vectors: dict[str, Tensor], shape: Appearance) -> float:
        """The cosine of a picture's vector and a shape's; 0 for a shape that is empty."""
        if name == "clip":
            if shape.render is None:
                return 0.0
            tower = self.networks[name]
            return float((vectors[name] * tower(self._pixels(tower, on_white(shape.render)))).sum())
        if len(shape.points) == 0:
            return 0.0
        encoder = self.networks[name]
        weight = next(encoder.parameters())
        points = torch.from_numpy(shape.points).to(weight.device, weight.dtype)
        vector = F.normalize(encoder(prepare_points(points[None], name in Z_UP)).float(), dim=-1)
        return float((vectors[TOWER_OF[name]] * vector).sum())

    def missing(self, names: tuple[str, ...]) -> str:
        """One line about the scores that are left out; "" if none is."""
        absent = [f"{NAMES.get(name, FID)} (weights.{name})" for name in names if name not in self.networks]
        return f"Left out, since no weights were given: {', '.join(absent)}.\n" if absent else ""


def learned_table(scores: LearnedScores, records: list[dict[str, dict[str, float]]]) -> tuple[dict, str]:
    """Return the summaries for evaluation.json, and the table with a line about the scores that are left out.

    Args:
        records: what `add` has returned for each shape.
    """
    names = [name for name in NAMES if name in scores.networks]
    has_fid = "inception" in scores.networks
    summaries: dict[str, Any] = {
        method: {name: summarize([record[method][name] for record in records]) for name in names}
        for method in (RESULT, TRUTH)
    }
    rows = [[method, *(format_summary(found[name], digits=4) for name in names)] for method, found in summaries.items()]
    if has_fid:
        summaries["normal_fid"] = scores.fid()
        rows = [[*rows[0], f"{summaries['normal_fid']:.2f}"], [*rows[1], "0"]]
    header = ["method", *(f"{NAMES[name]} ↑" for name in names), *[f"{FID} ↓"] * has_fid]
    table = markdown_table(header, rows) + "\n" if names or has_fid else ""
    return summaries, table + scores.missing(("inception", *NAMES))
