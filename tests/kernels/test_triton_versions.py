"""The kernels in the oldest Triton they support, interpreted and compiled, and in the compiler of the installed one.

The other tests use the interpreter of the installed Triton. `make test` puts the oldest into `.venv`, with the NumPy
that its interpreter was built for.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from d3ds2.kernels.devices import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.1.0"  # Makefile names it too
NAMES = [
    "block_scores",
    "selection_attention",
    "spatial_sparse_attention_triton",
    "gather_conv",
    "segment_sum",
    "modulation",
    "group_norm",
    "compression",
    "ragged_attention",
]
WITHOUT_TRITON = ("torch_compile", "batched", "pairs_by_block")  # tests of torch alone
RUN = """
import sys, pytest, triton
if triton.__version__ != sys.argv[1]:
    sys.exit(f"expected Triton {sys.argv[1]}, got {triton.__version__} of {triton.__file__}")
sys.exit(pytest.main(sys.argv[2:]))
"""


def with_oldest_triton():
    packages = ROOT / ".venv" / f"triton-{OLDEST}"
    assert (packages / "triton").is_dir(), f"{packages} is missing: run `make test`, which installs it"
    paths = [str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_in_the_oldest_triton():
    environment = with_oldest_triton() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    tests = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in NAMES]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", f"not ({' or '.join(WITHOUT_TRITON)})"]
    command = [sys.executable, "-c", RUN, OLDEST, *options, *tests]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-4000:]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_for_cards_that_are_not_here():
    compile_launches("--cases", "subset")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_with_the_oldest_triton():
    compile_launches("--cases", "subset", "--cards", "sm_86,sm_90", packages=str(ROOT / ".venv" / f"triton-{OLDEST}"))


def compile_launches(*options: str, packages: str = "") -> None:
    """Run tests/support/compile_launches.py, with another Triton where `packages` is its folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "tests.support.compile_launches", *options]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["triton"] == (OLDEST if packages else version("triton"))
    assert all(launches >= 20 for launches, _ in found["launches and failures"].values()), found
