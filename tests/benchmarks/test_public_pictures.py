"""The sheet of public pictures: drawn by the seed, resumable, with a line for a picture that cannot be used."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import public_pictures

ROOT = Path(__file__).parents[2]


def test_one_mesh_and_one_bad_picture(tmp_path, monkeypatch):
    folder = tmp_path / "pictures" / "SomeRepository" / "examples"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "workflows" / "demo_input.png", folder / "lamp.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder.parent / "figure.png").write_bytes(b"no example")
    out = tmp_path / "out"
    arguments = ["public_pictures.py", str(tmp_path / "pictures"), "--out", str(out), "--count", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(public_pictures.d3ds2, "load_pipeline", lambda _: Few())
    public_pictures.main()
    table = (out / "public-pictures.md").read_text().splitlines()
    assert table[2].startswith("| 1 | SomeRepository/examples/broken.png | not an image that can be read")
    assert table[3] == "| 2 | SomeRepository/examples/lamp.png |  |"
    sheet = Image.open(out / "public-pictures.png")
    mesh = out / "SomeRepository_examples_lamp.png.glb"
    written = mesh.stat().st_mtime_ns
    public_pictures.main()  # the mesh is kept
    assert mesh.stat().st_mtime_ns == written
    assert Image.open(out / "public-pictures.png").tobytes() == sheet.tobytes()


class Few:
    """The shipped model with one step of each stage."""

    def __init__(self):
        self.pipeline = LOAD()

    def generate(self, image, seed):
        return self.pipeline.generate(image, seed=seed, structure_steps=1, latent_steps=1)


LOAD = public_pictures.d3ds2.load_pipeline


def test_too_few_pictures_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"expected 24 pictures in folders named \*example\* below .*, got 0"):
        public_pictures.draw(tmp_path, 24, 0)
