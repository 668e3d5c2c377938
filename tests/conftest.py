"""Settings that must hold before any test imports Triton or torch, here and in the processes that tests start."""

import os
from collections.abc import Iterator
from pathlib import Path

# several threads wait for each other longer than tiny networks compute; and only equal numbers give equal bits
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.comfy_stand_ins import ComfyUI
from tests.tiny_model import write_model

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Tests in any order start alike."""
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
