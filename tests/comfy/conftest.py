"""Real ComfyUIs with this pack, each started once for all tests, and a browser for one file of tests."""

from collections.abc import Iterator

import pytest

from tests.comfy.browser import Browser
from tests.comfy.installation import SOURCES, install
from tests.comfy.server import ComfyServer
from tests.support.tiny_model import write_model


@pytest.fixture(scope="session", params=SOURCES, ids=[f"comfyui-{version}" for version in SOURCES])
def comfyui(request, tmp_path_factory) -> Iterator[ComfyServer]:
    """A running server of each version, with two small models: `random`, and `other` in an extra model path."""
    folder = tmp_path_factory.mktemp(f"comfyui-{request.param}")
    write_model(folder / "models" / "direct3d_s2" / "random", structure_vae={"threshold": 0.65})
    server = ComfyServer(install(request.param), folder)
    write_model(server.elsewhere / "other", structure_vae={"threshold": 0.65})
    with server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
