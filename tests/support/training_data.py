"""Prepare, render and sample five generated meshes, once for all tests of the training scripts."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import trimesh

from training.data.array_files import write_arrays
from training.data.latent_moments import moments_path
from training.data.shape_files import latent_path, load_shape, shape_path
from training.data.symmetry import NUM_SYMMETRIES
from training.prepare_shapes import PrepareShapesConfig
from training.prepare_shapes import main as prepare_shapes
from training.render_views import RenderViewsConfig
from training.render_views import main as render_views
from training.sample_surfels import SampleSurfelsConfig
from training.sample_surfels import main as sample_surfels

R = 32  # voxels per edge; latents at 4³
COARSE = 24  # a second resolution
SPLITS = {"ball": "train", "box": "train", "torus": "train", "can": "train", "pill": "val"}


def write_meshes(folder: Path) -> None:
    """Write five closed meshes in four file formats, and an index with their splits."""
    folder.mkdir(parents=True)
    meshes = {
        "ball": trimesh.creation.icosphere(subdivisions=2),
        "box": trimesh.creation.box((1.0, 0.6, 1.4)),
        "torus": trimesh.creation.torus(1.0, 0.35, major_sections=24, minor_sections=12),
        "can": trimesh.creation.cylinder(0.5, 1.2, sections=24),
        "pill": trimesh.creation.capsule(height=1.0, radius=0.4, count=(12, 12)),
    }
    suffixes = {"ball": "obj", "box": "stl", "torus": "ply", "can": "glb", "pill": "obj"}
    records = []
    for name, mesh in meshes.items():
        file = f"{name}.{suffixes[name]}"
        mesh.export(folder / file)
        records.append({"file": file, "source": "generated", "split": SPLITS[name]})
    (folder / "index.json").write_text(json.dumps(records))


def prepared(tmp_path_factory) -> str:
    """Return a `data_dir` of shapes at R and COARSE with two views and surfels; the first call makes it."""
    root = tmp_path_factory.getbasetemp() / "training_data"
    if not root.exists():
        write_meshes(root / "meshes")
        meshes, data_dir = str(root / "meshes"), str(root / "data")
        prepare_shapes(PrepareShapesConfig(meshes=meshes, data_dir=data_dir, resolutions=(R, COARSE), workers=1))
        render_views(
            RenderViewsConfig(meshes=meshes, data_dir=data_dir, views=2, size=64, supersample=1, points=64, workers=1)
        )
        sample_surfels(SampleSurfelsConfig(meshes=meshes, data_dir=data_dir, number=4000, workers=1))
    return str(root / "data")


def write_latents(data_dir: Path) -> None:
    """Write latents of all shapes at R in all symmetries, drawn at random, as if encode_latents had made them."""
    rng, folder = np.random.default_rng(0), moments_path(data_dir, R).parent
    shutil.rmtree(folder.parent, ignore_errors=True)  # those of a test that trained on the data before it was copied
    folder.mkdir(parents=True)
    for name in SPLITS:
        for symmetry in range(NUM_SYMMETRIES):
            coords, _, _ = load_shape(shape_path(data_dir, R, name), symmetry)
            mean, logvar = rng.normal(size=(2, len(coords), 4)).astype(np.float16)
            path = latent_path(data_dir, R, name, symmetry)
            write_arrays(path, {"coords": coords, "mean": mean, "logvar": logvar})
    moments_path(data_dir, R).write_text(json.dumps({"latents_scale": 2.0}))


def write_toml(path: Path, config) -> None:
    """Write a config dataclass as a TOML file."""
    sections, values = {}, {}
    for name, value in dataclasses.asdict(config).items():
        (sections if isinstance(value, dict) else values)[name] = value
    tables = [values, *sections.values()]
    heads = ["", *[f"[{name}]\n" for name in sections]]
    lines = ["".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items() if v is not None) for table in tables]
    path.write_text("\n".join(head + body for head, body in zip(heads, lines, strict=True)))
