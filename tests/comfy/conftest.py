"""Real ComfyUIs with this pack, each started once for all tests, and a browser for one file of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.browser import Browser
from tests.comfy.checkout import install_checkout, version_of
from tests.comfy.installation import SOURCES, install
from tests.comfy.server import ComfyServer
from tests.support.tiny_model import write_model


def pytest_generate_tests(metafunc):
    """Run tests of a real ComfyUI in each pinned version, or in the checkout of `--comfyui`."""
    if "comfyui" in metafunc.fixturenames:
        checkout = metafunc.config.getoption("comfyui")
        versions = {version: version for version in SOURCES} if checkout is None else {version_of(checkout): checkout}
        ids = [f"comfyui-{version}" for version in versions]
        metafunc.parametrize("comfyui", versions.values(), ids=ids, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave tests marked `newest` to `make test-long` in an older ComfyUI."""
    newest = [*SOURCES][-1]
    for item in items:
        if item.get_closest_marker("newest") and item.callspec.params["comfyui"] != newest:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def comfyui(request, tmp_path_factory) -> Iterator[ComfyServer]:
    """A running server of each version, with two small models: `random`, and `other` in an extra model path."""
    installation = install_checkout(request.param) if isinstance(request.param, Path) else install(request.param)
    folder = tmp_path_factory.mktemp(f"comfyui-{installation.version}")
    write_model(folder / "models" / "direct3d_s2" / "random", structure_vae={"threshold": 0.65})
    server = ComfyServer(installation, folder)
    write_model(server.elsewhere / "other", structure_vae={"threshold": 0.65})
    with server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
