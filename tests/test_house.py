"""Rules of the house that a program can check; `make house` prints these counts and more."""

import ast

import pytest

from tests import house

MUST_BE_NONE = {
    "files above 400 lines": house.long_files,
    "docstrings beginning with What or Of": lambda: house.docstrings_beginning_with("What", "Of"),
    "questions about Triton or the GPU outside d3ds2 kernels": house.device_questions,
    "hidden state in geometry": house.hidden_state,
    "kernel files which name no definition": house.kernels_without_definition,
    "public functions on arrays without a shape in the docstring": house.without_shapes,
    "public functions raising ValueError without saying so": house.without_raises,
}


@pytest.mark.parametrize("count", MUST_BE_NONE)
def test_there_are_none(count):
    found = MUST_BE_NONE[count]()
    assert not found, "\n".join(found)


def test_the_report_has_every_wing():
    text = "\n".join(house.report())
    assert all(wing in text for wing in house.MAY_IMPORT)


@pytest.mark.parametrize(
    "text",
    ["x of any shape", "tokens (n,)", "coords (N, 4)", "offsets (B + 1,)", "(..., C) rows", "a volume (B, C, 8³)"],
)
def test_shapes_are_recognized(text):
    assert house._gives_shape(text)


@pytest.mark.parametrize("text", ["rows (packed, sorted)", "a box (x, y, width)", "no shape", "N rows"])
def test_other_parentheses_are_no_shapes(text):
    assert not house._gives_shape(text)


def functions(*sources: str) -> list[tuple[str, ast.FunctionDef, str]]:
    nodes = [ast.parse(source).body[0] for source in sources]
    return [(node.name, node, ast.get_docstring(node) or "") for node in nodes]


OPERATION = 'def norm(x: Tensor, weight: Tensor):\n    """Normalize x (N, C), weight (C,)."""'
DEFINITION = 'def norm_reference(x: Tensor, weight: Tensor):\n    """Definition of `norm`."""'


def test_a_definition_may_leave_its_shapes_to_the_operation():
    wing = functions(OPERATION, DEFINITION)
    assert house.refers_to_shapes("norm_reference", wing[1][1], wing)


@pytest.mark.parametrize(
    "operation",
    [
        OPERATION.replace("def norm(", "def other("),
        OPERATION.replace(" (N, C), weight (C,)", ""),
        OPERATION.replace("weight: Tensor", "scale: Tensor"),
        OPERATION.replace("weight: Tensor", "weight: float"),
    ],
    ids=["it does not exist", "it gives no shapes", "its parameters differ", "a parameter is no array"],
)
def test_a_definition_needs_an_operation_with_its_shapes(operation):
    wing = functions(operation, DEFINITION)
    assert not house.refers_to_shapes("norm_reference", wing[1][1], wing)


def test_a_definition_needs_one_operation_of_that_name():
    wing = functions(OPERATION, DEFINITION, OPERATION)
    assert not house.refers_to_shapes("norm_reference", wing[1][1], wing)
