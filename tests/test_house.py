"""Rules of the house that a program can check; `make house` prints these counts and more."""

import pytest

from tests import house

MUST_BE_NONE = {
    "files above 400 lines": house.long_files,
    "docstrings beginning with What or Of": lambda: house.docstrings_beginning_with("What", "Of"),
    "questions about Triton or the GPU outside d3ds2 kernels": house.device_questions,
    "hidden state in geometry": house.hidden_state,
    "kernel files which name no definition": house.kernels_without_definition,
}


@pytest.mark.parametrize("count", MUST_BE_NONE)
def test_there_are_none(count):
    found = MUST_BE_NONE[count]()
    assert not found, "\n".join(found)


def test_the_report_has_every_wing():
    text = "\n".join(house.report())
    assert all(wing in text for wing in house.MAY_IMPORT)


@pytest.mark.parametrize("text", ["coords (N, 4)", "offsets (B + 1,)", "(..., C) rows", "a volume (B, C, 8³)"])
def test_shapes_are_recognized(text):
    assert house._gives_shape(text)


@pytest.mark.parametrize("text", ["rows (packed, sorted)", "a box (x, y, width)", "no shape", "N rows"])
def test_other_parentheses_are_no_shapes(text):
    assert not house._gives_shape(text)
