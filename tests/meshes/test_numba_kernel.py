"""numba finds its machine code on disk again, whatever name the package is loaded under."""

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
