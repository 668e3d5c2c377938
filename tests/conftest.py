"""Settings that must hold before any test imports Triton or torch, here and in the processes that tests start."""

import os

# several threads wait for each other longer than tiny networks compute; and only equal numbers give equal bits
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Tests in any order start alike."""
    torch.set_num_threads(1)  # rembg imports numba's OpenMP threads, which change those of torch
    torch.manual_seed(0)
