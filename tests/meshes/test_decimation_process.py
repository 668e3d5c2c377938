"""Simplifying in another process makes the same mesh; cancelling kills the process."""

import signal
import subprocess

import numpy as np
import pytest
import trimesh

from d3ds2.meshes import decimation_process
from d3ds2.meshes.decimation_process import decimate_in_process
from d3ds2.meshes.mesh import Mesh, decimate


def ball(subdivisions: int) -> Mesh:
    sphere = trimesh.creation.icosphere(subdivisions)
    vertices = np.asarray(sphere.vertices, np.float32)
    return Mesh(vertices, np.asarray(sphere.faces, np.int64), vertices)


def test_the_process_makes_the_same_mesh(monkeypatch):
    monkeypatch.setattr(decimation_process, "MIN_FACES", 100)
    waited = []
    made = decimate_in_process(ball(4), 500, lambda: waited.append(1))
    expected = decimate(ball(4), 500)
    for name in ("vertices", "faces", "normals"):
        np.testing.assert_array_equal(getattr(made, name), getattr(expected, name))
    assert waited


def test_small_meshes_and_enough_faces_need_no_process(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    assert len(decimate_in_process(ball(3), 200, lambda: None).faces) <= 200
    monkeypatch.setattr(decimation_process, "MIN_FACES", 100)
    mesh = ball(3)
    assert decimate_in_process(mesh, 1280, lambda: None) is mesh


@pytest.mark.parametrize("waits", [1, 3])
def test_a_cancelled_process_is_killed_at_once_and_its_folder_deleted(monkeypatch, tmp_path, waits):
    """`on_wait` is not called again after it raised, and the process was killed, not waited for."""
    monkeypatch.setattr(decimation_process, "MIN_FACES", 100)
    monkeypatch.setattr(decimation_process, "PROGRAM", "import time; time.sleep(60)")  # exits with 0 unless killed
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started, waited = [], []

    class Process(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def cancel():
        waited.append(list(tmp_path.iterdir()))
        if len(waited) == waits:
            raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        decimate_in_process(ball(3), 200, cancel)
    assert len(waited) == waits and all(waited) and not list(tmp_path.iterdir())
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_the_error_of_the_process_is_reported(monkeypatch):
    monkeypatch.setattr(decimation_process, "MIN_FACES", 100)
    with pytest.raises(RuntimeError, match=r"simplifying the mesh failed: ValueError: .*at least 4, got 2"):
        decimate_in_process(ball(3), 2, lambda: None)
