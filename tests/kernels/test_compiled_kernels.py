"""The kernels in Triton's compiler, for cards that are not here: all compile, and fit into their shared memory.

A card takes most of a minute, so two stand here for the cards with the least shared memory, of NVIDIA and AMD.
`make test-long` adds the largest card, and `make compile` takes all eight.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from d3ds2.kernels.devices import HAS_TRITON
from tests.kernels.test_triton_versions import OLDEST, ROOT
from tests.support.network_cases import NETWORKS

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.mark.parametrize(
    "card", ["sm_86", *(pytest.param(card, marks=pytest.mark.long) for card in ("sm_90", "gfx942"))]
)
def test_kernels_compile_for_cards_that_are_not_here(card):
    compile_launches("--cases", "subset", "--cards", card)


@pytest.mark.parametrize(
    ("card", "cases"), [("sm_86", "subset"), pytest.param("sm_90", NETWORKS, marks=pytest.mark.long)]
)
def test_kernels_compile_with_the_oldest_triton(card, cases):
    """Check all but packed attention over heads of 128 channels on Hopper.

    No network has such heads, and FlashAttention takes them there; in its backward pass, the oldest Triton aborts.
    """
    packages = str(ROOT / ".venv" / f"triton-{OLDEST}")
    compile_launches("--cases", cases, "--cards", card, "--largest", packages=packages)


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
