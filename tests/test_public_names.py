"""`import d3ds2` offers every public name, and imports nothing until a name is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import d3ds2

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", d3ds2.__all__)
def test_a_public_name_gives_the_object_of_that_name(name):
    assert getattr(d3ds2, name).__name__ == name and name in dir(d3ds2)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'d3ds2' has no attribute 'nothing'"):
        d3ds2.nothing  # noqa: B018


def test_the_import_loads_nothing_else():
    program = "import sys, json, d3ds2; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    heavy = {"torch", "numpy", "numba", "PIL", "trimesh", "transformers", "safetensors"}
    assert not heavy & {name.split(".")[0] for name in modules}
    assert [name for name in modules if name.startswith("d3ds2.")] == []
