"""The kernels in the interpreter of the oldest Triton they support.

The other tests use the interpreter of the installed Triton. `make test` puts the oldest into `.venv`, with the NumPy
that its interpreter was built for.
"""

import os
import subprocess
import sys
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
