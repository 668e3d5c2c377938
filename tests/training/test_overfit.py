"""Two shapes, learned by heart through all stages by one command: a picture of each becomes its mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trimesh
from PIL import Image

from d3ds2.pipeline import load_pipeline
from training.data.shape_files import view_folder
from training.evaluation.shape_scores import ScoreConfig, Shape, compare

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "training" / "configs" / "overfit"
SHAPES = {
    "ring": trimesh.creation.torus(1.0, 0.4, major_sections=48, minor_sections=24),
    "can": trimesh.creation.cylinder(0.5, 1.4, sections=48),
}


@pytest.mark.long
def test_one_view_of_each_of_two_shapes_becomes_its_mesh(tmp_path):
    (tmp_path / "meshes").mkdir()
    for name, mesh in SHAPES.items():
        mesh.export(tmp_path / "meshes" / f"{name}.obj")
    records = [{"file": f"{name}.obj", "source": "made", "split": "train"} for name in SHAPES]
    (tmp_path / "meshes" / "index.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "training", str(RECIPE), "meshes=meshes", "data_dir=data", "model_dir=model"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

    data_dir, pipeline = str(tmp_path / "data"), load_pipeline(tmp_path / "model")
    scoring = ScoreConfig(data_dir, pipeline.sampling.sdf_resolution)
    for name in SHAPES:
        truth = Shape.of_file(name, 0, scoring)
        for number, picture in enumerate(sorted(view_folder(data_dir, name).glob("*.png"))):
            mesh = pipeline.generate(Image.open(picture), seed=number)
            scores = compare(Shape(mesh.vertices, mesh.faces, scoring), truth, scoring)
            assert scores["iou"] >= 0.95, (name, picture.name, scores)
