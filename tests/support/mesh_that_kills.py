"""A stand-in for `prepare` whose mesh named "bad" takes its process with it, as one that needs all memory does.

In a file of its own, so that the processes of the test import little.
"""

import os


def prepare(entry, _config) -> dict[str, int]:
    if entry.name == "bad":
        os._exit(1)
    return {"16": len(entry.name)}
