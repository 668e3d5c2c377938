"""Each mesh has a worker process to itself: it fails alone, and no worker outlives the script."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mesh_work import entries, work
from training.mesh_jobs import Failure, MachineError, finished, run_jobs

ROOT = Path(__file__).parents[2]


def test_a_mesh_that_kills_or_exhausts_its_process_fails_alone(tmp_path):
    names = ("a", "kills", "bb", "is_huge", "ccc", "is_bad")
    results = {e.name: r for e, r in run_jobs(work, entries(*names), str(tmp_path / "log"), workers=2)}
    assert results == {
        "a": 1,
        "bb": 2,
        "ccc": 3,
        "kills": Failure("its process died with exit code 1 (out of memory?)"),
        "is_huge": Failure("out of memory"),
        "is_bad": Failure("ValueError: expected a mesh, got none"),
    }
    assert len((tmp_path / "log").read_text().splitlines()) == 8  # two of them were tried again


def test_an_error_of_the_disk_ends_the_run_and_is_no_mesh_s_fault(tmp_path):
    log, failed = tmp_path / "failures.jsonl", []
    jobs = run_jobs(work, entries("a", "is_bad", "fills_the_disk", "bb"), str(tmp_path / "log"), workers=1)
    done = []
    with pytest.raises(MachineError, match=r"No space left on device: 'fills_the_disk'; what is finished is kept"):
        done.extend(e.name for e, _ in finished(jobs, 4, log, failed))
    assert done == ["a"] and [failure["name"] for failure in failed] == ["is_bad"]
    assert len(log.read_text().splitlines()) == 1


def test_workers_end_with_the_script_that_is_killed(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.support.mesh_work", str(log), "sleeps", "sleeps", "sleeps"]
    script = subprocess.Popen(command, cwd=ROOT)
    while not log.is_file() or len(log.read_text().splitlines()) < 2:
        assert script.poll() is None
        time.sleep(0.05)
    workers = [int(line) for line in log.read_text().split()]
    script.send_signal(signal.SIGKILL)
    script.wait()
    until = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # a container without init may keep the dead as zombies
    return not (state.is_file() and state.read_text().rpartition(")")[2].split()[0] == "Z")
