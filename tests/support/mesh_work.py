"""Stand-ins for the per-mesh functions, in a file of their own so that the processes which use them import little.

python -m tests.support.mesh_work LOG NAME...    # works on the meshes as a script does, with two workers
"""

import errno
import os
import sys
import time
from pathlib import Path

from training.data.meshes import MeshEntry
from training.mesh_jobs import run_jobs


def work(entry, log) -> int:
    """Write this process's id to the log; then do what the mesh's name says."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    if entry.name == "sleeps":
        time.sleep(600)
    if entry.name.startswith("holds"):  # for ever, at its first try
        first = Path(f"{log}.{entry.name}")
        if not first.is_file():
            first.write_text(f"{os.getpid()}\n")
            time.sleep(600)
    if entry.name == "kills":
        os._exit(1)
    if entry.name == "is_huge":
        raise MemoryError
    if entry.name == "is_bad":
        raise ValueError("expected a mesh,\ngot none")
    if entry.name == "fills_the_disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(entry.path))
    return len(entry.name)


def entries(*names: str) -> list[MeshEntry]:
    """Entries of these names, whose files need not exist."""
    return [MeshEntry(name, Path(name), "train", "test") for name in names]


if __name__ == "__main__":
    for _ in run_jobs(work, entries(*sys.argv[2:]), sys.argv[1], workers=2):
        pass
