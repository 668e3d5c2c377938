"""Hypothesis strategies of hostile values: numbers, texts, JSON trees and files with a fault."""

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

BIG = (10**6, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**63, 2**64, 10**30)
INTS = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 64, -1, -8, *BIG, *(-big for big in BIG)))
FLOATS = st.sampled_from((0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e30, 1e300, math.inf, -math.inf, math.nan))
NAMES = st.sampled_from(
    ("", ".", "..", " ", "a\0b", "a\nb", "x" * 300, "a" * 5000, "../up", "a/../../b", "/absolute", "\udc80", "NUL",
     "<img src=x onerror=alert(1)>", "con", "~", "%s", "{}", "\u202eabc", "-o", "--help")
)  # fmt: skip
TREES = st.sampled_from(([], {}, [1] * 100, {"a": {"b": 1}}))
VALUES = st.one_of(INTS, FLOATS, NAMES, st.none(), st.booleans(), TREES)


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Draw a file with one to three faults: bits turned, bytes replaced by great numbers, a piece cut or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("bit", "number", "cut", "repeat", "end", "zeros")))
        # half of the faults lie in the header, where the sizes are
        most = max(0, len(data) - 1)
        at = draw(st.one_of(st.integers(0, min(most, 128)), st.integers(0, most)))
        if kind == "bit" and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "number":
            number = draw(st.sampled_from((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 20_000_000, 0x00FFFFFF)))
            data = data[:at] + number.to_bytes(4, draw(st.sampled_from(("little", "big")))) + data[at + 4 :]
        elif kind == "cut":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 64] * draw(st.integers(1, 20)) + data[at + 64 :]
        elif kind == "zeros":
            data = data[:at] + bytes(draw(st.integers(1, 64))) + data[at + 1 :]
        else:
            data = data[:at]
    return data


@st.composite
def changed_tree(draw: Any, tree: Any, values: st.SearchStrategy = VALUES) -> Any:
    """Draw a JSON tree in which one to three values, anywhere, were replaced, removed or given a new key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if action == "replace":
            holder[key] = copy.deepcopy(draw(values))
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(("surplus", "uri", "sparse", "extensions", "children")))] = copy.deepcopy(
                draw(values)
            )
        else:
            holder.append(copy.deepcopy(draw(values)))
    return tree


def _places(tree: Any):
    """Yield each (holder, key) of a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def as_json(tree: Any) -> bytes:
    """Write a tree as JSON; lone surrogates are escaped."""
    return json.dumps(tree).encode()
