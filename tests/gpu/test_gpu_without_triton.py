"""A GPU on which Triton cannot compile: the command line says so in one line, and makes the mesh without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trimesh

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.gpu


def test_a_compiler_that_is_missing_costs_time_and_no_mesh(tmp_path):
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {
        "PATH": str(tmp_path / "empty"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "HOME": str(tmp_path),
    }
    out = tmp_path / "mesh.glb"
    picture = ROOT / "workflows" / "demo_input.png"
    command = [sys.executable, "-m", "d3ds2", str(picture), "-o", str(out), "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if "no Triton" in line]
    assert len(lines) == 1 and "ompiler" in lines[0] and "Remedy: install a C compiler" in lines[0], done.stderr[-3000:]
    assert trimesh.load(out, force="mesh").is_watertight
