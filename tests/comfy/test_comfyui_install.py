"""The pack's requirements replace no package of a ComfyUI, and the registry's own tool accepts the pack."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

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


def comfy_node(command: str, folder: Path) -> str:
    """Run the registry's own tool on a pack's folder and return what it printed."""
    home = install_comfy_cli()
    environment = os.environ | {"HOME": str(home), "DO_NOT_TRACK": "1"}
    words = [str(home / "venv" / "bin" / "comfy"), "--skip-prompt", "--no-enable-telemetry", "node", command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_registry_accepts_the_pack():
    assert "All validation checks passed" in comfy_node("validate", PACK)


def test_the_archive_of_the_registry_is_small_and_whole(tmp_path):
    """It has all that git tracks but what .comfyignore names, and nothing that the rest needs is named there."""
    if not (PACK / ".git").exists():
        pytest.skip("the tool asks git for the files, and this folder is no repository")
    clone = tmp_path / "pack"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(PACK), str(clone)], check=True)
    comfy_node("pack", clone)
    archive = clone / "node.zip"
    assert archive.stat().st_size < 45 << 20
    with zipfile.ZipFile(archive) as packed:
        names = set(packed.namelist())
    assert {"__init__.py", "nodes/mesh_export.py", "web/status_text.js", "workflows/Image-to-Mesh.json"} <= names
    assert {f"d3ds2/weights/tiny/{name}.safetensors" for name in ("latent_dit", "sdf_vae")} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "."))]
    tracked = subprocess.run(["git", "ls-files"], cwd=clone, capture_output=True, text=True, check=True).stdout
    parts = ("d3ds2/", "nodes/", "training/", "web/", "locales/", "workflows/", "subgraphs/")
    assert {name for name in tracked.splitlines() if name.startswith(parts)} <= names
