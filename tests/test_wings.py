"""Imports go down the wings, never up. The table of what a wing may import is in house.py."""

import pytest

from tests.house import MAY_IMPORT, modules_of, python_files, upward_imports, wing_of


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_imports_only_from_the_wings_below_it(wing):
    assert modules_of(wing)
    climbing = upward_imports(wing)
    assert not climbing, "\n".join(climbing)


def test_every_module_lies_in_a_wing():
    modules = python_files("d3ds2", "nodes", "training", "benchmarks")
    assert {wing_of(path) for path in modules} == set(MAY_IMPORT)
