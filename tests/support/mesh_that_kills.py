"""A stand-in for `prepare` that kills its process for the mesh "bad", as a mesh that needs too much memory does.

It has its own file so that the processes which the test starts import little.
"""

import os


def prepare(entry, _config) -> dict[str, int]:
    if entry.name == "bad":
        os._exit(1)
    if entry.name == "huge":
        raise MemoryError
    return {"16": len(entry.name)}
