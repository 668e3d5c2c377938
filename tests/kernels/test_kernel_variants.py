"""The variants of the kernels that a network compiles: the first structure needs all but a few of them.

Each takes most of a second to compile, and without a rule each structure would need more: Triton makes a variant for an
integer that is 1, for one that 16 divides, and for any other.
"""

import json
import os
import subprocess
import sys

import pytest

from d3ds2.kernels.devices import HAS_TRITON
from tests.kernels.test_triton_versions import ROOT

# what later structures may add: a result of few rows is cut into shorter tiles, so that it keeps a whole GPU busy
ALLOWED = {"_conv_kernel": 12}
USES = 5


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_later_structures_compile_hardly_any_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "tests.support.kernel_variants", "--uses", "small", "--structures", "6"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    uses = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(uses) == USES and all(use["first"] >= 10 for use in uses), uses
    for use in uses:
        beyond = {kernel: count for kernel, count in use["later"].items() if count > ALLOWED.get(kernel, 0)}
        assert not beyond, f"{use['use']}: expected the first structure to need these variants already, got {beyond}"
