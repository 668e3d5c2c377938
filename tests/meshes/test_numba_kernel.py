"""numba finds its machine code on disk again, whatever name the package is loaded under."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "d3ds2" / "meshes" / "numba_kernel.py"
MODULE = "from .numba_kernel import kernel\n\n\n@kernel\ndef double(x):\n    return 2 * x\n"
PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], "package/__init__.py")
sys.modules[sys.argv[1]] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
double = importlib.import_module(f"{sys.argv[1]}.doubling").double
print(double(21), sum(double.stats.cache_hits.values()))
"""


def test_each_name_of_the_package_finds_its_own(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "doubling.py").write_text(MODULE)
    shutil.copy(SOURCE, package)
    results = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, name], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for name in ("package", "/ComfyUI/custom_nodes/A-pack", "package", "/ComfyUI/custom_nodes/A-pack")
    ]
    assert results == ["42 0\n", "42 0\n", "42 1\n", "42 1\n"]


ANNOUNCED = """
from package.doubling import double
from package.numba_kernel import announce_numba
lines = []
with announce_numba(lambda: lines.append("compiling")):
    double(21), double(2.5)
print(len(lines), sum(double.stats.cache_hits.values()))
"""


def run_package(folder: Path, home: Path) -> list[str]:
    """Run ANNOUNCED twice with `home` as the user's cache folder, and return what each run printed."""
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "NUMBA_CACHE_DIR": ""}
    command = [sys.executable, "-c", ANNOUNCED]
    return [
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    ]


def copy_package(tmp_path: Path) -> Path:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "doubling.py").write_text(MODULE)
    shutil.copy(SOURCE, package)
    return package


def test_compiling_is_announced_once_and_only_in_the_first_run(tmp_path):
    copy_package(tmp_path)
    assert run_package(tmp_path, tmp_path / "home") == ["1 0\n", "0 2\n"]
    assert not (tmp_path / "home").exists()


def test_a_package_that_cannot_be_written_is_kept_in_the_cache_of_the_user(tmp_path):
    package = copy_package(tmp_path)
    (package / "__pycache__").write_text("a file, because permissions do not stop root")
    assert run_package(tmp_path, tmp_path / "home") == ["1 0\n", "0 2\n"]
    assert list((tmp_path / "home").rglob("*.nbc"))
