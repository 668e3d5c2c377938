"""Fixtures, and settings that must be made before Triton or torch is imported, here and in processes tests start."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

# tiny networks run faster on one thread, and results are the same bit by bit only for equal numbers of threads
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from d3ds2.kernels import devices
from tests.comfy.installation import SOURCES
from tests.support.cards import CARDS
from tests.support.comfy_stand_ins import ComfyUI
from tests.support.tiny_model import write_model

# pytest-xdist starts with these parts. Long files come first, so that no worker starts one at the end. The tests of one
# real ComfyUI form one part. The second ComfyUI comes after the long files, when the machine is less busy.
LONG = (
    "test_compiled_kernels",
    "test_triton_versions",
    "test_training_stages",
    "test_distributed",
    "test_spatial_sparse_attention_triton",
    "test_pipeline_stages",
    "test_train_diffusion",
)
FIRST, *OTHERS = (f"comfyui-{version}" for version in reversed(SOURCES))
ORDER = {part: number for number, part in enumerate((FIRST, *LONG, *OTHERS))}

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter


LESSER_CARDS = {  # the abilities that `pytest -m gpu --card NAME` takes from the GPU that is here
    "sm_86": {name: getattr(CARDS["sm_86"], name) for name in ("capability", "shared_memory", "multiprocessors")},
    "no-triton": {"triton": False},
    "no-flash": {"flash": False},
    "torch-alone": {"triton": False, "flash": False},
}


def pytest_addoption(parser):
    parser.addoption("--card", choices=LESSER_CARDS, help="take the GPU for a lesser one: its tiles, its limits")
    parser.addoption("--comfyui", type=Path, help="run tests/comfy in this checkout instead of the pinned ComfyUIs")


def pytest_configure(config):
    take_lesser_card(config, devices)


def take_lesser_card(config, module) -> None:
    """Let a copy of d3ds2.kernels.devices take the GPU for the card of `--card`."""
    name = config.getoption("--card", None)
    if name is not None:
        module.pretend(torch.device("cuda", torch.cuda.current_device()), **LESSER_CARDS[name])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run tests that share a file or a real ComfyUI in the same worker, with --dist loadfile."""
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
    """Return the real ComfyUI that a test uses, such as comfyui-1.2.3, else the name of its file."""
    found = re.search(r"\[(comfyui-[\d.]+)[-\]]", nodeid)
    return found[1] if found else Path(nodeid.split("::")[0]).stem


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Start every test from the same state, whatever ran before it."""
    torch.set_num_threads(1)  # rembg loads numba's OpenMP, which changes torch's number of threads
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def comfy_folder(tmp_path_factory) -> Path:
    """ComfyUI's folder, with the model `random`; a test file may override this."""
    folder = tmp_path_factory.mktemp("comfy")
    (folder / "output").mkdir()
    write_model(folder / "models" / "direct3d_s2" / "random")
    return folder


@pytest.fixture(scope="module")
def comfy_device() -> str:
    """Where the networks run; a test file may override this."""
    return "cpu"


@pytest.fixture(scope="module")
def comfy(request, comfy_folder, comfy_device) -> Iterator[ComfyUI]:
    """The pack on stand-ins for ComfyUI, shared by all tests of a file."""
    comfy = ComfyUI(comfy_folder, device=comfy_device)
    take_lesser_card(request.config, comfy.module("d3ds2.kernels.devices"))
    yield comfy
    comfy.close()
