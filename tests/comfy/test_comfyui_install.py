"""The pack's requirements replace no package of a ComfyUI, and the registry's own tool accepts the pack."""

import os
import re
import subprocess

import pytest

from tests.comfy.installation import PACK, REQUIREMENTS, SOURCES, install, install_comfy_cli


@pytest.mark.parametrize("version", SOURCES)
def test_requirements_replace_no_package(version):
    installation = install(version)
    before, now = installation.packages_before, installation.packages_now()
    assert {"torch", "torchvision", "numpy", "transformers", "safetensors", "pillow"} <= set(before)
    assert {name: now.get(name) for name in before} == before
    wanted = {re.split(r"[<>=]", line)[0] for line in REQUIREMENTS.read_text().split("\n") if line and line[0] != "#"}
    names = {name.lower().replace("_", "-") for name in now}
    assert names >= wanted
    assert not names & {"triton", "spconv", "spconv-cu120", "torchsparse", "flash-attn", "rembg"}  # nothing needs it


def test_the_registry_accepts_the_pack():
    folder = install_comfy_cli()
    environment = os.environ | {"HOME": str(folder), "DO_NOT_TRACK": "1"}
    command = [str(folder / "venv" / "bin" / "comfy"), "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All validation checks passed" in done.stdout + done.stderr
