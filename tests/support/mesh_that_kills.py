"""A stand-in for `prepare`: the mesh named "bad" ends its process, as a mesh that needs all memory does.

It has a file of its own so that the processes of the test import little.
"""

import os


def prepare(entry, _config) -> dict[str, int]:
    if entry.name == "bad":
        os._exit(1)
    return {"16": len(entry.name)}
