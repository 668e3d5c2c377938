"""Simplifying in another process: it makes the same mesh, and stops at once when asked."""

import time

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


def test_work_on_a_large_mesh_stops_within_a_second():
    started = None

    def cancel():
        nonlocal started
        started = started or time.monotonic()
        if time.monotonic() - started > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decimate_in_process(ball(8), 10_000, cancel)  # 1.3 million faces take some seconds
    assert time.monotonic() - started < 1.3


def test_the_error_of_the_process_is_reported(monkeypatch):
    monkeypatch.setattr(decimation_process, "MIN_FACES", 100)
    with pytest.raises(RuntimeError, match=r"simplifying the mesh failed: ValueError: .*at least 4, got 2"):
        decimate_in_process(ball(3), 2, lambda: None)
