"""Meshes on a Ray cluster of two nodes on this machine: workers and nodes die, the other meshes are finished."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trimesh

from tests.support.mesh_work import entries, work
from training.mesh_jobs import Failure
from training.prepare_shapes import PrepareShapesConfig
from training.ray_jobs import run_on_ray
from training.render_views import RenderViewsConfig

ROOT = Path(__file__).parents[2]
MEMORY = 80 << 20  # bytes of a node's object store, the least that Ray takes
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two nodes with a core each, which RAY_ADDRESS names; and its second node."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=MEMORY)
    second = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, second
    cluster.shutdown()


@pytest.mark.long
@with_ray
def test_meshes_of_a_killed_worker_and_of_a_lost_node_are_done_elsewhere(cluster, tmp_path):
    cluster, second = cluster
    log = tmp_path / "log"

    def kill():
        started = [Path(f"{log}.holds_1"), Path(f"{log}.holds_2")]
        while not all(file.is_file() and file.read_text().endswith("\n") for file in started):
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)
        for file in started:  # the one on the first node is alive
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue

    killer = threading.Thread(target=kill)
    killer.start()
    names = ("holds_1", "holds_2", "a", "kills", "is_bad", "bb")
    results = {entry.name: result for entry, result in run_on_ray(work, entries(*names), str(log))}
    killer.join()
    death = results.pop("kills")
    assert isinstance(death, Failure) and death.error.startswith("its worker died 3 times") and not death.of_machine
    bad = Failure("ValueError: expected a mesh, got none")
    assert results == {"holds_1": 7, "holds_2": 7, "a": 1, "bb": 2, "is_bad": bad}


@pytest.mark.long
@with_ray
def test_the_scripts_run_on_a_cluster(cluster, tmp_path):
    meshes, data = tmp_path / "meshes", tmp_path / "data"
    meshes.mkdir()
    trimesh.creation.box((1, 2, 3)).export(meshes / "box.ply")
    (meshes / "broken.ply").write_text("no mesh")
    (tmp_path / "shapes.toml").write_text('engine = "ray"\nresolutions = [32]\n')
    (tmp_path / "views.toml").write_text('engine = "ray"\nviews = 2\nsize = 32\n')
    for script, config in (("prepare_shapes", "shapes"), ("render_views", "views")):
        command = [sys.executable, "-m", f"training.{script}", tmp_path / f"{config}.toml"]
        done = subprocess.run(
            [*command, f"meshes={meshes}", f"data_dir={data}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    (record,) = json.loads((data / "index.json").read_text())
    assert record["name"] == "box" and record["num_tokens"]["32"] > 0
    assert sorted(path.name for path in (data / "views" / "box").iterdir()) == ["000.png", "001.png", "cameras.json"]
    for log in ("failures.jsonl", "view_failures.jsonl"):
        assert json.loads((data / log).read_text())["name"] == "broken"


@with_ray
def test_without_a_cluster_one_line_says_how_to_start_one(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where no cluster of this machine has left its address
    with pytest.raises(OSError, match="ray start --head"):
        next(run_on_ray(work, entries("a"), str(tmp_path / "log")))


def test_without_ray_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[ray\]"):
        next(run_on_ray(work, entries("a"), str(tmp_path / "log")))


def test_an_unknown_engine_is_refused():
    for config in (PrepareShapesConfig, RenderViewsConfig):
        with pytest.raises(ValueError, match="expected engine of processes, ray, got 'slurm'"):
            config(engine="slurm")
