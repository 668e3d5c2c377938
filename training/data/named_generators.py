"""Random generators that follow from a name alone, on every machine and in every version of Python."""

import hashlib

import numpy as np


def generator_of(name: str) -> np.random.Generator:
    """Return the generator of a name, which no other name shares."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng(np.frombuffer(digest[:16], dtype=np.uint32))
