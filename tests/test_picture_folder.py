"""`python -m d3ds2 PICTURES -o MESHES`: a mesh of each picture; bad pictures are named, finished meshes are kept."""

import shutil

import pytest
import trimesh
from PIL import Image

from d3ds2.__main__ import main
from d3ds2.images.image_file import ImageError
from d3ds2.picture_folder import list_pictures, name_meshes
from tests.support.tiny_model import draw_object, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), structure_vae={"threshold": 0.65})  # few tokens


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw_object().save(folder / "a lamp.png")
    draw_object((120, 80)).save(folder / "été.webp")
    return folder


def run(pictures, meshes, model, *more) -> int:
    options = ("--model", model, "--device", "cpu", "--steps", "1")
    return main([str(part) for part in (pictures, "-o", meshes, *options, *more)])


def test_each_picture_becomes_a_mesh_and_bad_ones_are_named(tmp_path, pictures, model, capsys):
    (pictures / "broken.png").write_bytes(b"no picture")
    Image.new("RGBA", (64, 64)).save(pictures / "empty.png")
    (pictures / "notes.txt").write_text("no picture either, and not meant to be one")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "more.png").mkdir()
    meshes = tmp_path / "new" / "meshes"
    assert run(pictures, meshes, model) == 1
    assert sorted(file.name for file in meshes.iterdir()) == ["a lamp.glb", "été.glb"]
    assert all(trimesh.load(file, force="mesh").is_watertight for file in meshes.iterdir())
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [
        f"error: not an image that can be read: {pictures / 'broken.png'}",
        f"error: {pictures / 'empty.png'}: the image is fully transparent",
    ]


def test_the_mesh_of_a_folder_is_that_of_the_picture_alone(tmp_path, pictures, model):
    assert run(pictures, tmp_path / "meshes", model, "--seed", "4", "--format", "stl", "--size", "0.1") == 0
    alone = tmp_path / "alone.stl"
    assert run(pictures / "a lamp.png", alone, model, "--seed", "4", "--size", "0.1") == 0
    assert (tmp_path / "meshes" / "a lamp.stl").read_bytes() == alone.read_bytes()


def test_a_second_run_makes_what_is_missing(tmp_path, pictures, model, capsys):
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    (meshes / "a lamp.glb").write_bytes(b"of an earlier run")
    assert run(pictures, meshes, model) == 0
    assert (meshes / "a lamp.glb").read_bytes() == b"of an earlier run" and (meshes / "été.glb").exists()
    assert capsys.readouterr().err.endswith(f"{meshes}: 1 made, 1 already there, 0 failed\n")
    assert run(pictures, meshes, model, "--again") == 0
    assert (meshes / "a lamp.glb").read_bytes()[:4] == b"glTF"
    assert capsys.readouterr().err.endswith(f"{meshes}: 2 made, 0 already there, 0 failed\n")


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, pictures, model, monkeypatch):
    from d3ds2.pipeline import Pipeline

    generate, count = Pipeline.generate, []

    def stopped_at_the_second(*arguments, **more):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **more)

    monkeypatch.setattr(Pipeline, "generate", stopped_at_the_second)
    meshes = tmp_path / "meshes"
    assert run(pictures, meshes, model) == 130
    assert [file.name for file in meshes.iterdir()] == ["a lamp.glb"]
    assert run(pictures, meshes, model) == 0 and len(count) == 3
    assert sorted(file.name for file in meshes.iterdir()) == ["a lamp.glb", "été.glb"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mask", "mask.png"], "expected one picture for --mask, got the folder"),
        (["--preview", "a.png"], "expected one picture for --preview, got the folder"),
        (["--views", "a.png"], "expected one picture for --views, got the folder"),
        (["--format", "fbx"], "argument --format: invalid choice"),
    ],
)
def test_options_of_one_picture_are_refused(tmp_path, pictures, model, capsys, more, message):
    assert run(pictures, tmp_path / "meshes", model, *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "meshes").exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path, pictures, model, capsys):
    (tmp_path / "taken").write_text("a file")
    assert run(pictures, tmp_path / "taken", model) == 2
    assert f"cannot make the folder {tmp_path / 'taken'}: File exists" in capsys.readouterr().err
    shutil.rmtree(pictures)
    pictures.mkdir()
    assert run(pictures, tmp_path / "meshes", model) == 2
    assert f"expected pictures such as .png or .jpg in {pictures}, got none" in capsys.readouterr().err
    with pytest.raises(ImageError, match="cannot read"):
        list_pictures(tmp_path / "absent")


def test_pictures_of_one_name_get_a_mesh_each(tmp_path):
    pictures = [tmp_path / name for name in ("a.png", "A.jpg", "b.png")]
    assert [file.name for file in name_meshes(pictures, tmp_path, ".obj").values()] == [
        "a.png.obj",
        "A.jpg.obj",
        "b.obj",
    ]
