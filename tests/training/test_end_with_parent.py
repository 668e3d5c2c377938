"""A script ends with the process that started it, also if that one is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.command import PARENT

ROOT = Path(__file__).parents[2]
CHILD = "from training.command import end_with_parent; end_with_parent(); print('ready', flush=True); input()"
STARTER = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=os.environ | {{{PARENT!r}: str(os.getpid())}})
print(child.pid, flush=True)
child.wait()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rsplit(")")[-1].split()[0] != "Z"


def test_a_script_ends_when_its_parent_is_killed():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, text=True, **pipes) as starter:
        said = {starter.stdout.readline().strip() for _ in range(2)}
        (pid,) = (int(word) for word in said - {"ready"})
        assert "ready" in said and is_running(pid)
        starter.kill()
        deadline = time.monotonic() + 60
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(pid)


def test_a_script_ends_whose_parent_has_ended_before():
    environment = os.environ | {PARENT: "999999999"}
    ended = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGTERM and ended.stdout == b""
