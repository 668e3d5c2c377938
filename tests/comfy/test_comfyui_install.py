"""What the pack's requirements do to a ComfyUI, and what the registry's own tool says of the pack."""

import os
import re
import subprocess

import pytest

from tests.comfy.installation import (
    PACK,
    REQUIREMENTS,
    SOURCES,
    cache_folder,
    install,
    make_venv,
    only_one_process,
    pip_install,
)

COMFY_CLI = "1.23.0"


@pytest.mark.parametrize("version", SOURCES)
def test_requirements_replace_no_package(version):
    installation = install(version)
    before, now = installation.packages_before, installation.packages_now()
    assert {"torch", "torchvision", "numpy", "transformers", "safetensors", "pillow"} <= set(before)
    assert {name: now.get(name) for name in before} == before
    wanted = {re.split(r"[<>=]", line)[0] for line in REQUIREMENTS.read_text().split("\n") if line and line[0] != "#"}
    names = {name.lower().replace("_", "-") for name in now}
    assert names >= wanted
    assert not names & {"triton", "spconv", "spconv-cu120", "torchsparse", "flash-attn", "rembg"}  # all runs without


def test_the_registry_accepts_the_pack():
    with only_one_process("comfy-cli"):
        folder = cache_folder() / f"comfy-cli-{COMFY_CLI}"
        if not (folder / "complete").exists():
            pip_install(make_venv(folder), f"comfy-cli=={COMFY_CLI}")
            (folder / "complete").touch()
    environment = os.environ | {"HOME": str(folder), "DO_NOT_TRACK": "1"}
    command = [str(folder / "bin" / "comfy"), "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All validation checks passed" in done.stdout + done.stderr
