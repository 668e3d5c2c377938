"""Settings that must hold before any test imports Triton or torch, here and in the processes that tests start."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # more of them wait for each other longer than tiny networks compute

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter
torch.set_num_threads(1)  # also where torch was imported before
