"""Run `decimate` in a process of its own, so that the program stays responsive, to ComfyUI's Cancel button for one.

fast-simplification holds the GIL for all of its work: two seconds for a million faces.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .mesh import Mesh, decimate

MIN_FACES = 200_000  # simplifying fewer takes less time than starting a process
POLL_SECONDS = 0.1
# `-c` and not `-m`: an embedded Python does not look into the working directory
PROGRAM = """import sys; sys.path.insert(0, sys.argv[1])
from d3ds2.meshes.decimation_process import main; main(sys.argv[2:])"""


def decimate_in_process(mesh: Mesh, target_faces: int, on_wait: Callable[[], None]) -> Mesh:
    """Simplify as `decimate` does, calling `on_wait` ten times a second; if it raises, the process is killed.

    Raises:
        ValueError: as `decimate`.
        RuntimeError: the process failed; the message ends with the last line that it wrote.
    """
    if len(mesh.faces) <= MIN_FACES or len(mesh.faces) <= target_faces:
        return decimate(mesh, target_faces)
    with tempfile.TemporaryDirectory(prefix="d3ds2-") as folder:
        source, result = Path(folder) / "source.npz", Path(folder) / "result.npz"
        np.savez(source, vertices=mesh.vertices, faces=mesh.faces, normals=mesh.normals)
        package_root = Path(__file__).parents[2]
        command = [sys.executable, "-c", PROGRAM, package_root, source, result, str(target_faces)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while process.poll() is None:
                on_wait()
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()  # does nothing if the process has ended
            message = process.communicate()[1].decode(errors="replace").strip()
        if process.returncode:
            raise RuntimeError(f"simplifying the mesh failed: {message.splitlines()[-1] if message else 'no message'}")
        return _load(result)


def main(arguments: list[str]) -> None:
    """Simplify the mesh in a file into another file: the program of the process.

    Args:
        arguments: source file, result file, number of faces.
    """
    source, result, target_faces = arguments
    mesh = decimate(_load(source), int(target_faces))
    np.savez(result, vertices=mesh.vertices, faces=mesh.faces, normals=mesh.normals)


def _load(file: str | Path) -> Mesh:
    with np.load(file) as arrays:
        return Mesh(arrays["vertices"], arrays["faces"], arrays["normals"])
