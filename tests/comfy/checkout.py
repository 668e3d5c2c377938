"""A checkout of ComfyUI, of any version, installed as the pinned ones are: for versions that no package carries yet.

git clone https://github.com/Comfy-Org/ComfyUI && python -m pytest tests/comfy --comfyui=ComfyUI
"""

import os
import shutil
from pathlib import Path

from tests.comfy.installation import (
    REQUIREMENTS,
    Installation,
    _common_pins,
    _install_common,
    freeze,
    made_once,
    pip_install,
)


def version_of(checkout: Path) -> str:
    """Return the version of a checkout. Raises ValueError if the folder is none."""
    file = checkout / "comfyui_version.py"
    if not file.is_file():
        raise ValueError(f"expected a checkout of ComfyUI with {file.name}, got {checkout}")
    return file.read_text().split('"')[1]


def install_checkout(checkout: Path) -> Installation:
    """Install what a checkout and the pack require beside the packages that all versions share.

    Raises RuntimeError with pip's output if something cannot be installed.
    """
    checkout, version = checkout.resolve(), version_of(checkout)

    def make(folder: Path) -> None:
        common = made_once("common", _install_common)
        shutil.copytree(common / "venv", folder / "venv", symlinks=True, copy_function=os.link)
        (folder / "source").symlink_to(checkout)
        installation, pinned = Installation(version, folder), folder / "pinned.txt"
        pinned.write_text("\n".join(sorted(_common_pins())))
        pip_install(installation.python, "-r", checkout / "requirements.txt", "-c", pinned)
        (folder / "packages-before.txt").write_text(freeze(installation.python))
        pip_install(installation.python, "-r", REQUIREMENTS)

    recipe = str(checkout), (checkout / "requirements.txt").read_text(), REQUIREMENTS.read_text()
    return Installation(version, made_once("checkout", make, *recipe))
