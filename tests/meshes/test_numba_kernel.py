"""numba finds its machine code on disk again: by the content of the source, wherever and whenever it was installed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import FunctionType

from d3ds2.meshes.numba_kernel import _Files, kernel

SOURCE = Path(__file__).parents[2] / "d3ds2" / "meshes" / "numba_kernel.py"
MODULE = """from .factor import FACTOR
from .numba_kernel import kernel


@kernel
def double(x):
    return FACTOR * same(x)


@kernel
def same(x):
    return 1 * x
"""
PROGRAM = """
import importlib.util, sys
names = [path.replace(".", "_x_") for path in sys.argv[1:]]  # as ComfyUI names its packs
for name, path in zip(names, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(name, f"{path}/__init__.py")
    sys.modules[name] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    importlib.import_module(f"{name}.doubling")
for name in names:
    double = sys.modules[f"{name}.doubling"].double
    lines = []
    with sys.modules[f"{name}.numba_kernel"].announce_numba(lambda: lines.append("compiling")):
        print(double(21), double(2.5), end=" ")
    print(len(lines), sum(double.stats.cache_hits.values()))
"""
COMPILED, LOADED = "42 5.0 1 0\n", "42 5.0 0 2\n"


def install(folder: Path) -> Path:
    """Write a package with kernels into a new folder, as a clone would: the files are as old as the clone."""
    package = folder / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "factor.py").write_text("FACTOR = 2\n")
    (package / "doubling.py").write_text(MODULE)
    shutil.copyfile(SOURCE, package / SOURCE.name)
    return package


def run(home: Path, *packages: Path, chosen: Path | str = "") -> str:
    """Run PROGRAM with `home` as the user's cache folder and `chosen` as NUMBA_CACHE_DIR; return what it printed."""
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "NUMBA_CACHE_DIR": str(chosen)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Python's own cache goes by time and size, which a test may keep
    command = [sys.executable, "-c", PROGRAM, *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.stderr
    return done.stdout


def test_a_fresh_clone_compiles_nothing(tmp_path):
    first, home = install(tmp_path / "first"), tmp_path / "home"
    assert [run(home, first), run(home, first)] == [COMPILED, LOADED]
    assert not list(first.rglob("*.nb?"))
    second = install(tmp_path / "second" / "ComfyUI-0.33")
    for path in second.iterdir():
        os.utime(path, (1e9, 1e9))
    shutil.rmtree(first)
    assert run(home, second) == LOADED


def test_two_versions_in_one_process(tmp_path):
    home, packages = tmp_path / "home", [install(tmp_path / name) for name in ("one", "the_same", "another")]
    (packages[2] / "factor.py").write_text("FACTOR = 4\n")
    assert run(home, *packages) == COMPILED + LOADED + "84 10.0 1 0\n"
    assert run(home, *packages) == LOADED + LOADED + "84 10.0 0 2\n"


def test_a_changed_source_is_compiled(tmp_path):
    package, home = install(tmp_path), tmp_path / "home"
    assert run(home, package) == COMPILED
    for name, old, new, result in (
        ("doubling.py", "1 * x", "3 * x", "126 15.0 1 0\n"),
        ("factor.py", "2", "4", "252 30.0 1 0\n"),
        ("numba_kernel.py", "plain threads", "threads", "252 30.0 1 0\n"),
    ):
        path = package / name
        age = path.stat().st_mtime
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        os.utime(path, (age, age))
        assert run(home, package) == result


def test_the_user_chooses_the_folder(tmp_path):
    package, home, chosen = install(tmp_path), tmp_path / "home", tmp_path / "chosen"
    assert [run(home, package, chosen=chosen), run(home, package, chosen=chosen)] == [COMPILED, LOADED]
    assert list(chosen.rglob("*.nbc")) and not home.exists()


def test_a_home_that_cannot_be_written(tmp_path):
    package, home = install(tmp_path), tmp_path / "home"
    home.write_text("a file, because permissions do not stop root")
    assert [run(home, package), run(home, package)] == [COMPILED, LOADED]
    assert list((package / "__pycache__").rglob("*.nbc"))
    shutil.rmtree(package / "__pycache__")
    (package / "__pycache__").write_text("a file, too")
    assert run(home, package) == COMPILED


def test_a_function_without_a_source_file_is_compiled_in_memory():
    code = (lambda x: x + 1).__code__.replace(co_filename="<string>")
    assert kernel(FunctionType(code, {}, "increase"))(2) == 3


def test_two_processes_that_save_at_once_never_mix_their_machine_code(tmp_path):
    """Both read the index before either writes it; the index of one and the machine code of the other come last."""
    zen, lake, later = (_Files(str(tmp_path), "double", "stamp") for _ in range(3))
    zen._load_index = lake._load_index = dict
    zen.save(("int64", "zen4"), "for zen4")
    lake.save(("int64", "skylake"), "for skylake")
    zen._save_index = print
    zen.save(("int64", "zen4"), "for zen4")
    assert (later.load(("int64", "zen4")), later.load(("int64", "skylake"))) == (None, "for skylake")
    later.save(("int64", "zen4"), "for zen4")
    assert (later.load(("int64", "zen4")), later.load(("int64", "skylake"))) == ("for zen4", "for skylake")


def test_what_was_not_used_for_months_is_deleted(tmp_path):
    package, home = install(tmp_path), tmp_path / "home"
    kept = home / "numba" / "d3ds2"
    for name, days in (("unused", 100), ("used", 80)):
        (kept / name).mkdir(parents=True)
        (kept / name / "f.nbc").touch()
        os.utime(kept / name, (time.time() - days * 24 * 3600,) * 2)
    run(home, package)
    assert sorted(path.name.split("_")[0] for path in kept.iterdir()) == ["doubling", "used"]
    (folder,) = kept.glob("doubling_*")
    os.utime(folder, (1e9, 1e9))
    run(home, package)
    assert folder.stat().st_mtime > time.time() - 3600
