"""`python -m d3ds2` writes files; every error is one line and exit code 2."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.__main__ import main
from tests.support.tiny_model import draw_object, write_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), structure_vae={"threshold": 0.65})  # few tokens


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "object.png"
    draw_object().save(path)
    return path


def command(image, output, model, *more):
    return [str(a) for a in (image, "-o", output, "--model", model, "--device", "cpu", *more)]


def error_of(capsys, arguments) -> str:
    """Return the error message of a run, which must be one line on standard error, with exit code 2."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def run_process(arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "d3ds2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_write_the_same_file(tmp_path, image, model):
    theirs, ours = tmp_path / "a.glb", tmp_path / "b.glb"
    done = run_process(command(image, theirs, model, "--seed", "7"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for stage in ("1/5 image", "2/5 structure", "3/5 latents", "4/5 sdf", "5/5 mesh"):
        assert stage in done.stderr
    assert "Warning" not in done.stderr
    assert main(command(image, ours, model, "--seed", "7")) == 0
    assert theirs.read_bytes() == ours.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.glb", "b.glb"]


def test_a_process_fails_without_a_traceback(tmp_path, model):
    done = run_process(command(tmp_path / "absent.png", tmp_path / "a.glb", model))
    assert done.returncode == 2
    assert done.stderr == f"error: no such image: {tmp_path / 'absent.png'}\n"


@pytest.mark.parametrize("extension", ["glb", "obj", "ply", "stl", "GLB"])
def test_every_format_loads_again(tmp_path, image, model, extension):
    output = tmp_path / f"mesh.{extension}"
    assert main(command(image, output, model, "--steps", "1")) == 0
    loaded = trimesh.load(output, file_type=extension.lower(), force="mesh")  # merges the vertices of an STL
    assert loaded.is_watertight and loaded.is_winding_consistent and loaded.volume > 0
    assert loaded.extents.max() == pytest.approx(1000 if extension == "stl" else 1, rel=1e-4)  # a metre


def test_size_up_axis_and_number_of_faces(tmp_path, image, model, capsys):
    def make(name, *more):
        assert main(command(image, tmp_path / name, model, "--steps", "1", *more)) == 0
        return trimesh.load(tmp_path / name, force="mesh")

    own = make("own.glb", "--size", "0")
    assert np.abs(own.bounds).max() <= 1 and own.extents.max() > 1  # the model's box
    sized = make("sized.glb", "--size", "0.06", "--up", "Z", "--faces", "500")
    assert "mm" not in capsys.readouterr().err
    np.testing.assert_allclose(sized.extents[[0, 2, 1]], own.extents * 0.06 / own.extents.max(), rtol=0.1)
    assert sized.extents.max() == pytest.approx(0.06, rel=1e-4)
    assert len(sized.faces) < len(own.faces) and sized.is_watertight
    assert make("sized.stl", "--size", "0.06").extents.max() == pytest.approx(60, rel=1e-4)
    assert " mm" in capsys.readouterr().err
    assert main(command(image, tmp_path / "a.3mf", model, "--steps", "1")) == 0
    assert (tmp_path / "a.3mf").read_bytes()[:2] == b"PK"


def test_glb_has_normals_and_says_how_it_was_made(tmp_path, image, model):
    output = tmp_path / "mesh.glb"
    assert main(command(image, output, model, "--seed", "11", "--steps", "1")) == 0
    data = output.read_bytes()
    tree = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    assert tree["asset"]["generator"] == "ComfyUI-D3DS2"
    assert tree["asset"]["extras"] == {"model": "random", "image": "object.png", "seed": 11}
    assert set(tree["meshes"][0]["primitives"][0]["attributes"]) == {"POSITION", "NORMAL"}
    assert "vn " in write_obj(tmp_path, image, model)


def write_obj(folder, image, model) -> str:
    assert main(command(image, folder / "mesh.obj", model, "--steps", "1")) == 0
    return (folder / "mesh.obj").read_text()


def test_preview_shows_input_and_four_sides(tmp_path, image, model):
    assert main(command(image, tmp_path / "a.glb", model, "--steps", "1", "--preview", tmp_path / "a.png")) == 0
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert sheet.shape[1] > 4 * sheet.shape[0]
    columns = np.array_split(sheet[30:], 5, axis=1)
    assert all((column < 250).mean() > 0.05 for column in columns)
    is_orange = (columns[0][..., 0] > 200) & (columns[0][..., 2] < 80)
    assert is_orange.mean() > 0.1


def test_a_mask_replaces_the_search(tmp_path, model, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    mask = np.zeros((80, 96), dtype=np.uint8)
    mask[20:60, 30:70] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:40]).save(tmp_path / "small.png")
    arguments = command(tmp_path / "noise.png", tmp_path / "a.glb", model, "--steps", "1", "--mask")
    assert main([*arguments, str(tmp_path / "mask.png")]) == 0
    capsys.readouterr()
    assert "expected a mask of the image's size (96, 80), got (96, 40)" in error_of(
        capsys, [*arguments, tmp_path / "small.png"]
    )


def save_image(folder: Path, what: str) -> Path:
    """Save an image that cannot be used, for the reason that `what` names."""
    path = folder / f"{what}.png"
    if what == "text":
        path.write_text("not an image")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what == "truncated":
        draw_object((200, 200), "RGB").save(path)
        path.write_bytes(path.read_bytes()[:400])
    elif what == "transparent":
        Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(path)
    elif what == "speck":
        image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
        image.putpixel((3, 3), (0, 0, 0, 255))
        image.save(path)
    elif what == "plain":
        Image.new("RGB", (64, 64), (200, 10, 10)).save(path)
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such image"),
        ("text", "not an image that can be read"),
        ("empty", "not an image that can be read"),
        ("folder", "expected a folder for the meshes of"),
        ("truncated", "the image is truncated or damaged"),
        ("transparent", "the image is fully transparent"),
        ("speck", "no foreground in the image: the image is almost fully transparent"),
        ("plain", "no foreground in the image: nothing stands out"),
    ],
)
def test_unusable_images(tmp_path, model, capsys, what, message):
    path = save_image(tmp_path, what)
    assert message in error_of(capsys, command(path, tmp_path / "a.glb", model))
    assert not (tmp_path / "a.glb").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("mesh.fbx", "expected an output that ends in .glb, .obj, .ply, .stl"),
        ("mesh", "expected an output that ends in"),
        ("absent/mesh.glb", "no folder"),
        ("taken.glb", "it is a folder"),
        ("file.txt/mesh.glb", "no folder"),
        ("/proc/mesh.glb", "cannot write /proc/mesh.glb"),
    ],
)
def test_unusable_outputs(tmp_path, image, model, capsys, output, message):
    (tmp_path / "taken.glb").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert message in error_of(capsys, command(image, tmp_path / output, model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "taken.glb"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no model folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged file"),
        (lambda folder: (folder / "latent_dit.safetensors").unlink(), "missing file"),
        (lambda folder: (folder / "sdf_vae.safetensors").write_bytes(b"\0" * 100), "damaged file"),
        (
            lambda folder: shutil.copy(folder / "sdf_vae.safetensors", folder / "structure_vae.safetensors"),
            "structure_vae.safetensors misses tensors",
        ),
    ],
)
def test_unusable_models(tmp_path, image, model, capsys, damage, message):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    damage(copy)
    assert message in error_of(capsys, command(image, tmp_path / "a.glb", copy))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "-1"], "expected a seed from 0"),
        (["--seed", "one"], "argument --seed: invalid int value"),
        (["--steps", "0"], "expected at least 1 step"),
        (["--device", "tpu"], "argument --device: invalid choice"),
        (["--device", "mps"], "--device: expected a device that is here, got mps"),
        (["--precision", "fp8"], "argument --precision: invalid choice"),
        (["--preview", "a.gif"], "expected a preview that ends in .png"),
        (["--preview", "absent/a.png"], "no folder absent"),
        (["--sampler", "rk4"], "argument --sampler: invalid choice"),
        (["--guidance-interval", "0.8", "0.2"], "expected a guidance interval with 0 <= low <= high <= 1"),
        (["--guidance-rescale", "2"], "expected a guidance rescale from 0 to 1, got 2.0"),
        (["--views"], "argument --views: expected at least one argument"),
        (["--views", "absent.png"], "no such image: absent.png"),
        (["--size", "-1"], "--size: expected a size in metres from 1e-06 to 1e+06, or 0, got -1"),
        (["--size", "nan"], "--size: expected a size in metres"),
        (["--size", "inf"], "--size: expected a size in metres"),
        (["--size", "1e300"], "--size: expected a size in metres"),
        (["--faces", "3"], "expected --faces of at least 4, got 3"),
        (["--up", "X"], "argument --up: invalid choice"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_unusable_arguments(tmp_path, image, model, capsys, more, message):
    assert message in error_of(capsys, command(image, tmp_path / "a.glb", model, *more))


def test_a_result_never_replaces_an_input_or_another_result(tmp_path, image, model, capsys):
    mask = tmp_path / "mask.png"
    Image.open(image).getchannel("A").save(mask)
    before = image.read_bytes(), mask.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(image)
    for preview in (image, link, mask):
        arguments = command(image, tmp_path / "a.glb", model, "--mask", mask, "--preview", preview)
        assert "expected a new file for each result, got" in error_of(capsys, arguments)
    assert (image.read_bytes(), mask.read_bytes()) == before and not (tmp_path / "a.glb").exists()


def test_several_views_make_one_mesh(tmp_path, image, model, capsys):
    side, empty, output = tmp_path / "side.png", tmp_path / "empty.png", tmp_path / "a.glb"
    Image.open(image).rotate(90).save(side)
    Image.new("RGBA", (64, 48)).save(empty)
    few = ("--steps", "2", "--guidance-interval", "0", "0.5", "--guidance-rescale", "0.5", "--sampler", "heun")
    assert main(command(image, output, model, *few)) == 0
    alone = output.read_bytes()
    assert main(command(image, output, model, *few, "--views", side, image)) == 0
    data = output.read_bytes()
    tree = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    assert tree["asset"]["extras"]["views"] == "side.png, object.png" and data != alone
    capsys.readouterr()
    assert f"{empty}: the image is fully transparent" in error_of(
        capsys, command(image, output, model, "--views", side, empty)
    )
    assert "expected a new file for each result" in error_of(
        capsys, command(image, output, model, "--views", side, "--preview", side)
    )


def test_missing_output_is_an_error(image, capsys):
    assert "the following arguments are required: -o/--output" in error_of(capsys, [image])


def test_a_failed_write_keeps_the_old_file(tmp_path, image, model, capsys, monkeypatch):
    output = tmp_path / "a.glb"
    output.write_bytes(b"old")

    def full_disk(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert main(command(image, output, model, "--steps", "1")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: cannot write {output}: No space left on device"
    monkeypatch.undo()
    assert output.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.glb"]


def test_interrupting_leaves_nothing(tmp_path, image, model, capsys, monkeypatch):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("d3ds2.pipeline.Pipeline.sample_latents", interrupted)
    assert main(command(image, tmp_path / "a.glb", model)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
