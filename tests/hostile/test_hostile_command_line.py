"""Any arguments of `python -m d3ds2` end in whole files or in one line, and no other file is touched."""

import contextlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from d3ds2.__main__ import main
from d3ds2.meshes.mesh_file import MeshFileError, check_writable, save_mesh
from tests.support.bounded import as_nobody, assert_one_line, limited_memory, outcome
from tests.support.hostile import FLOATS, INTS, NAMES
from tests.support.tiny_model import draw_object, write_model

ROOT = Path(__file__).parents[2]
MORE = 1 << 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, links and two models: one makes a mesh, in the other every structure is empty."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model", structure_vae={"threshold": 0.65})
    write_model(folder / "empty", structure_vae={"threshold": 0.999999})
    draw_object().save(folder / "object.png")
    draw_object().getchannel("A").save(folder / "mask.png")
    (folder / "text.png").write_text("no picture")
    (folder / "taken.glb").mkdir()
    (folder / "loop.glb").symlink_to(folder / "loop.glb")
    (folder / "dangling.glb").symlink_to(folder / "nothing" / "a.glb")
    (folder / "input.glb").symlink_to(folder / "object.png")
    return folder


def listing(folder: Path) -> dict[str, tuple]:
    """Return what lies in a folder, with sizes and times."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def run(argv: list[str]) -> tuple[int, list[str]]:
    """Run the command; return its exit code and its lines on standard error, without progress bars."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), limited_memory(MORE):
        code = main(argv)
    lines = [line.strip() for part in said.getvalue().split("\r") for line in part.split("\n")]
    progress = ("%|", "it/s]", "compiling loops")
    return code, [line for line in lines if line and not any(mark in line for mark in progress)]


IMAGES = st.one_of(st.sampled_from(("object.png", "mask.png", "text.png", "model", "absent.png", "taken.glb")), NAMES)
OUTPUTS = st.one_of(
    st.sampled_from(("a.glb", "a.obj", "a.xyz", "taken.glb", "loop.glb", "dangling.glb", "input.glb", "object.png",
                     "no/a.glb", "text.png/a.glb", "loop.glb/a.glb", "a" * 300 + ".glb", "a\0.glb", ".glb", "..glb")),
    NAMES,
)  # fmt: skip
OPTIONS = {
    "--seed": st.one_of(INTS, FLOATS, NAMES),
    "--steps": st.one_of(INTS, FLOATS, NAMES),
    "--memory": st.one_of(FLOATS, INTS, NAMES),
    "--device": st.one_of(st.sampled_from(("cpu", "auto", "cuda", "mps")), NAMES),
    "--precision": st.one_of(st.sampled_from(("fp32", "fp16")), NAMES),
    "--background": st.one_of(st.sampled_from(("alpha", "plain", "rembg")), NAMES),
    "--mask": IMAGES,
    "--preview": st.one_of(st.sampled_from(("p.png", "object.png", "mask.png", "p.jpg", "no/p.png")), OUTPUTS),
    "--size": st.one_of(FLOATS, INTS, NAMES),
    "--up": NAMES,
    "--faces": st.one_of(INTS, FLOATS),
    "--views": IMAGES,
    "--format": NAMES,
    "--sampler": st.one_of(st.just("heun"), NAMES),
    "--guidance-interval": FLOATS,
    "--guidance-rescale": st.one_of(FLOATS, NAMES),
    "--model": st.one_of(st.sampled_from(("empty", "text.png", "absent", "loop.glb")), NAMES),
}


@given(data=st.data())
def test_any_arguments_end_in_one_line(place, data):
    options = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=3, unique=True))
    given_values = {name: data.draw(OPTIONS[name]) for name in options}
    paths = {"image": data.draw(IMAGES), "-o": data.draw(OUTPUTS)}
    assume(paths["image"].strip("./ ") != "")  # a folder of pictures, each of which has its line
    values = {"--model": "empty", "--device": "cpu", "--steps": 1} | given_values | {"-o": paths["-o"]}
    argv = [str(place / paths["image"])]
    for name, value in values.items():
        is_path = name in ("-o", "--model", "--mask", "--preview", "--views")
        argv += [f"{name}={place / value}" if is_path and value not in ("-o", "--help") else f"{name}={value}"]
    before = listing(place)
    code, lines = run(argv)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (argv, lines)
    assert_one_line(lines[0])
    assert listing(place) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", str(10**12)], "expected at most 10000 steps, got 1000000000000"),
        (["--steps", str(2**64)], "expected at most 10000 steps"),
        (["--seed", str(2**64)], "expected a seed from 0 to 2^64 - 1"),
        (["--memory", "nan"], "expected a positive number of GiB for --memory, got nan"),
        (["--memory", "inf"], "expected a positive number of GiB for --memory, got inf"),
        (["--memory", "-1"], "expected a positive number of GiB for --memory, got -1.0"),
        (["--model", "m" * 300], "File name too long"),
        (["--mask", "m" * 300], "File name too long"),
        (["--preview", "m" * 300 + ".png"], "File name too long"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(place, more, message):
    before = listing(place)
    code, lines = run([str(place / "object.png"), "-o", str(place / "a.glb"), "--model", str(place / "model"), *more])
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert listing(place) == before


@pytest.mark.parametrize("name", ["loop.glb", "dangling.glb"])
def test_a_link_that_leads_nowhere_is_replaced_by_the_mesh(place, tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / ("nothing" if name == "dangling.glb" else name))
    arguments = [str(place / "object.png"), "-o", str(tmp_path / name), "--model", str(place / "model"), "--steps", "1"]
    code, lines = run([*arguments, "--device", "cpu"])
    assert code == 0 and len(lines) == 1 and "faces" in lines[0]
    assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_bytes()[:4] == b"glTF"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_disk_that_is_full_for_the_preview_keeps_the_mesh(place, tmp_path, monkeypatch):
    from PIL import Image

    def full_disk(self, path):
        raise OSError(28, "No space left on device")

    arguments = [str(place / "object.png"), "-o", str(tmp_path / "a.glb"), "--model", str(place / "model")]
    monkeypatch.setattr(Image.Image, "save", full_disk)
    code, lines = run([*arguments, "--steps", "1", "--device", "cpu", "--preview", str(tmp_path / "a.png")])
    assert code == 2 and len(lines) == 2 and lines[0].startswith(f"{tmp_path / 'a.glb'}: ")
    assert lines[1] == f"error: cannot write {tmp_path / 'a.png'}: No space left on device; the mesh is written"
    assert [path.name for path in tmp_path.iterdir()] == ["a.glb"]
    assert (tmp_path / "a.glb").read_bytes()[:4] == b"glTF"


def test_a_disk_that_is_full_for_compiled_code_changes_nothing(tmp_path):
    code = """
import resource, sys
import numpy as np
from d3ds2.meshes.mesh import area_weighted_normals
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file can be written any more
print((1000 * area_weighted_normals(np.eye(3), np.array([[0, 1, 2]]))).astype(int).tolist()[0])
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[577, 577, 577]\n", ""), done


def test_commands_that_check_and_write_one_file_at_once(tmp_path):
    from d3ds2.meshes.mesh import Mesh

    path = tmp_path / "a.stl"
    mesh = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]]), np.eye(3, dtype=np.float32))

    def work(index):
        check_writable(path)
        if index % 10 == 0:
            save_mesh(path, mesh)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(3000)))
    assert [file.name for file in tmp_path.iterdir()] == ["a.stl"] and path.stat().st_size == 134


def test_a_folder_without_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o555)
    for path in (tmp_path / "a.glb", tmp_path / "in" / "a.glb"):
        with as_nobody(tmp_path):
            error = outcome(lambda path=path: check_writable(path), MeshFileError)
        assert isinstance(error, MeshFileError) and "cannot write" in str(error)
    tmp_path.chmod(0o755)


@pytest.mark.long  # Python compiles every module again
@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_an_optimized_python_works_or_says_why_not(place, flag):
    done = subprocess.run(
        [sys.executable, flag, "-m", "d3ds2", str(place / "absent.png"), "-o", str(place / "a.glb")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert ("run Python without -OO" if flag == "-OO" else "no such image") in done.stderr
