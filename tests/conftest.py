"""Settings for tests and the processes they start; some must be made before Triton or torch is imported."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

# threads would spend longer waiting than tiny networks compute, and results are equal bit for bit only if the number
# of threads is
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.comfy.installation import SOURCES
from tests.support.comfy_stand_ins import ComfyUI
from tests.support.tiny_model import write_model

# pytest-xdist begins with these parts: long files come first, so that no worker ends with one. All tests of one real
# ComfyUI are a part; the second ComfyUI comes after the long files, when the machine is less busy.
LONG = ("test_triton_versions", "test_training_stages", "test_spatial_sparse_attention_triton", "test_pipeline_stages")
FIRST, *OTHERS = (f"comfyui-{version}" for version in reversed(SOURCES))
ORDER = {part: number for number, part in enumerate((FIRST, *LONG, *OTHERS))}

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, tests that share a file or a real ComfyUI run in the same worker."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class LoadPartScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    return LoadPartScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=lambda item: ORDER.get(part_of(item.nodeid), len(ORDER)))


def part_of(nodeid: str) -> str:
    """Return the real ComfyUI that a test asks for, as comfyui-1.2.3, or else the name of its file."""
    found = re.search(r"\[(comfyui-[\d.]+)[-\]]", nodeid)
    return found[1] if found else Path(nodeid.split("::")[0]).stem


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Start every test from the same state, whatever ran before it."""
    torch.set_num_threads(1)  # rembg imports numba, whose OpenMP changes torch's number of threads
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def comfy_folder(tmp_path_factory) -> Path:
    """ComfyUI's folder, with the model `random`; a test file may override it."""
    folder = tmp_path_factory.mktemp("comfy")
    (folder / "output").mkdir()
    write_model(folder / "models" / "direct3d_s2" / "random")
    return folder


@pytest.fixture(scope="module")
def comfy_device() -> str:
    """The device of the networks; a test file may override it."""
    return "cpu"


@pytest.fixture(scope="module")
def comfy(comfy_folder, comfy_device) -> Iterator[ComfyUI]:
    """The pack over stand-ins of ComfyUI, for all tests of a file."""
    comfy = ComfyUI(comfy_folder, device=comfy_device)
    yield comfy
    comfy.close()
