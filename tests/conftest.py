"""Settings that must hold before any test imports Triton or torch, here and in the processes that tests start."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

# several threads wait for each other longer than tiny networks compute; and only equal numbers give equal bits
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.comfy.installation import SOURCES
from tests.support.comfy_stand_ins import ComfyUI
from tests.support.tiny_model import write_model

# pytest-xdist begins with these: long files come first, so that no worker is left with one at the end. All tests of one
# real ComfyUI are one part; the second part comes after the first and the long files, when the machine is less busy.
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
    """The real ComfyUI that a test asks for, as comfyui-1.2.3, or the name of its file."""
    found = re.search(r"\[(comfyui-[\d.]+)[-\]]", nodeid)
    return found[1] if found else Path(nodeid.split("::")[0]).stem


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Start every test from the same state, in any order of tests."""
    torch.set_num_threads(1)  # rembg imports numba's OpenMP threads, which change those of torch
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def comfy_folder(tmp_path_factory) -> Path:
    """ComfyUI's folder, with the model `random`; a file of tests may bring its own."""
    folder = tmp_path_factory.mktemp("comfy")
    (folder / "output").mkdir()
    write_model(folder / "models" / "direct3d_s2" / "random")
    return folder


@pytest.fixture(scope="module")
def comfy_device() -> str:
    """Where the networks run; a file of tests may bring its own."""
    return "cpu"


@pytest.fixture(scope="module")
def comfy(comfy_folder, comfy_device) -> Iterator[ComfyUI]:
    """The pack over stand-ins of ComfyUI, for all tests of a file."""
    comfy = ComfyUI(comfy_folder, device=comfy_device)
    yield comfy
    comfy.close()
