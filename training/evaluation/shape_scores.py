"""Scores of a result against the true shape. Imports no torch, for the processes of the pool that computes them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.meshes.mesh_to_sdf import normalize_mesh
from d3ds2.meshes.sdf_to_mesh import DECODED_OPTIONS, sdf_to_mesh
from training.data.meshes import MeshEntry, read_mesh
from training.data.shape_files import load_shape, shape_path
from training.evaluation.metrics import (
    Surface,
    SurfaceDistances,
    connected_parts,
    count_shells,
    is_watertight,
    solid_grid,
    volume_iou,
)
from training.evaluation.normal_pictures import normal_pictures
from training.mesh_quality import block_plates

PAPER_DISTANCES = {"f1_0.005": 0.005, "f1_0.001": 0.001}  # of the paper's table of VAEs, here in [-1,1]
F_DISTANCE = 0.02  # in [-1,1]: 1 % of the cube's edge, a threshold that does not depend on the resolution


RESULT, TRUTH = "model", "truth"  # whose appearance it is
POINTS = 10_000  # of a surface, for networks that look at points
RENDER = 336  # pixels per edge, for networks that look at a render
CLEANLINESS = ("bodies", "genus", "plates")


@dataclass(frozen=True)
class Appearance:
    """The views of a shape that networks look at. One that is empty has no points and no render."""

    normals: np.ndarray  # (views, S, S, 3) uint8
    points: np.ndarray  # (n, 3) float32 on the surface
    render: np.ndarray | None  # (S, S, 4) uint8 from the input's camera


@dataclass(frozen=True)
class ScoreConfig:
    """Settings for comparing shapes."""

    data_dir: str
    resolution: int  # R of the SDF; one voxel is 2/R
    num_points: int = 20_000  # sampled on each surface
    cells: int = 128  # per edge of the grid on which the volume IoU is counted
    seed: int = 0
    level: float = 0.0  # of the surface in decoded SDFs; each model has its own


class Shape:
    """A closed mesh, prepared for comparison: vertices (V, 3) in [-1,1]³, faces (F, 3).

    A mesh without faces is valid: an empty, bad result.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, config: ScoreConfig):
        self.vertices, self.faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces, dtype=np.int64)
        self.solid = solid_grid(self.vertices, self.faces, config.cells)
        self.surface = Surface(self.vertices, self.faces, config.num_points, config.seed) if len(faces) else None

    def appearance(self, camera: Camera | None = None) -> Appearance:
        """Return what networks look at; a camera adds a render."""
        points = np.zeros((0, 3)) if self.surface is None else self.surface.points[:POINTS]
        render = None
        if camera is not None and len(self.faces):
            light = Light(azimuth=camera.azimuth + Light.azimuth, shadows=True)
            render = MeshRenderer(self.vertices, self.faces).render(camera, RENDER, light, supersample=2)
        return Appearance(normal_pictures(self.vertices, self.faces), points.astype(np.float32), render)

    @classmethod
    def of_blocks(cls, block_coords: np.ndarray, values: np.ndarray, config: ScoreConfig, decoded=False) -> "Shape":
        """Mesh SDF blocks (M,3), (M,8,8,8) at `config.resolution`; `decoded` ones as the pipeline does."""
        options: dict[str, Any] = DECODED_OPTIONS | {"level": config.level} if decoded else {"level": 0.0}
        if not (values < options["level"]).any():
            return cls(np.zeros((0, 3)), np.zeros((0, 3)), config)
        mesh = sdf_to_mesh(
            block_coords.astype(np.int64), values.astype(np.float32), config.resolution, threads=1, **options
        )
        return cls(mesh.vertices, mesh.faces, config)

    @classmethod
    def of_file(cls, name: str, symmetry: int, config: ScoreConfig) -> "Shape":
        """Mesh the prepared shape of this name, moved by the symmetry."""
        blocks, sdf, _ = load_shape(shape_path(config.data_dir, config.resolution, name), symmetry)
        return cls.of_blocks(blocks, sdf, config)


def compare(result: Shape, truth: Shape, config: ScoreConfig) -> dict[str, float]:
    """Score a result: volume IoU, chamfer distance, F1 at `F_DISTANCE` and at the paper's distances; precision, recall
    and F1 at one voxel.

    An empty result has an IoU and F1 of 0. Its chamfer distance is that from the truth to the centre of the cube.

    Raises:
        ValueError: the truth has no faces.
    """
    if truth.surface is None:
        raise ValueError("expected a true shape with faces, got one without")
    if result.surface is None:
        nothing = dict.fromkeys(("iou", "f1", "precision_voxel", "recall_voxel", "f1_voxel", *PAPER_DISTANCES), 0.0)
        return nothing | {"chamfer": float(np.linalg.norm(truth.surface.points, axis=1).mean())}
    distances = SurfaceDistances.between(result.surface, truth.surface)
    voxel = distances.f_score(2 / config.resolution)
    return {
        "iou": volume_iou(result.solid, truth.solid),
        "chamfer": distances.chamfer,
        "f1": distances.f_score(F_DISTANCE).f1,
        "precision_voxel": voxel.precision,
        "recall_voxel": voxel.recall,
        "f1_voxel": voxel.f1,
        **{name: distances.f_score(distance).f1 for name, distance in PAPER_DISTANCES.items()},
    }


def topology(shape: Shape) -> dict[str, float]:
    """Say whether a shape is watertight (1 or 0), and count its outer and inner shells."""
    outer, inner = count_shells(shape.vertices, shape.faces)
    return {"watertight": float(is_watertight(shape.faces)), "outer_shells": outer, "inner_shells": inner}


def cleanliness(shape: Shape, config: ScoreConfig) -> dict[str, float]:
    """Count the connected parts of a closed mesh, its tunnels (genus), and its plates at block borders."""
    if not len(shape.faces):
        return dict.fromkeys(CLEANLINESS, 0.0)
    labels = connected_parts(len(shape.vertices), shape.faces)
    used = np.unique(shape.faces)
    bodies = len(np.unique(labels[used]))
    euler = len(used) - len(shape.faces) // 2  # V - E + F, with 3 F / 2 edges
    plates = block_plates(shape.vertices, shape.faces, config.resolution)
    return {"bodies": float(bodies), "genus": bodies - euler / 2, "plates": float(plates.count)}


def score_round_trip(
    name: str,
    block_coords: np.ndarray,
    values: np.ndarray,
    entry: MeshEntry | None,
    config: ScoreConfig,
    look: bool = False,
) -> tuple[dict[str, float], dict[str, Appearance]]:
    """Score a decoded SDF (M,3), (M,8,8,8) against the prepared shape, and the original mesh if `entry` is given.

    The prepared surface lies slightly more than half a voxel outside the original (`shell` of mesh_to_sdf), so even a
    perfect result is not at distance 0 from it. Inner faces of the original are in neither.

    Returns:
        The scores; and if `look`, what networks look at, of RESULT and TRUTH.
    """
    result, truth = Shape.of_blocks(block_coords, values, config, decoded=True), Shape.of_file(name, 0, config)
    scores = compare(result, truth, config) | topology(result) | {"tokens": len(block_coords)}
    outer, inner = count_shells(truth.vertices, truth.faces)
    scores |= {"true_outer_shells": outer, "true_inner_shells": inner}
    if entry is not None and result.surface is not None:
        assert truth.surface is not None  # `compare` needs it
        vertices, faces, _ = read_mesh(entry)
        original = Surface(normalize_mesh(vertices), faces, 1, config.seed)
        scores["original_distance"] = float(original.distance(result.surface.points).mean())
        scores["original_distance_of_target"] = float(original.distance(truth.surface.points).mean())
    return scores, {RESULT: result.appearance(), TRUTH: truth.appearance()} if look else {}
