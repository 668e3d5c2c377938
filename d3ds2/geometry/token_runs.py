"""Blocks of consecutive tokens, as NSA has them, instead of blocks of voxels."""

from dataclasses import replace

import torch

from ..kernels.ragged import AttentionPlan
from ..kernels.sliding_window import SlidingWindow
from .attention_plan import attention_plan
from .per_grid import per_grid
from .voxels import BLOCK, Voxels

RUN = BLOCK**2  # tokens of a block: about as many as a surface leaves in a block of 8³ voxels


@per_grid
def token_runs(voxels: Voxels) -> Voxels:
    """Return voxels on which attention by blocks is attention by runs of consecutive tokens.

    The tokens of a sample are numbered in their order. Every RUN of them is one block of the result, in the same order,
    and every quarter of a run is one cell of 4³. So coarsening by 8 gives runs, and coarsening by 4 gives quarters.
    Rows stay where they are.
    """
    first = voxels.cu_seqlens[:-1].long()
    number = torch.arange(len(voxels), device=voxels.device) - first[voxels.batch_index]
    run, place = number // RUN, number % RUN
    x, y, z = place // 32 * 4, place // 4 % 8, place % 4  # two cells along x, two along y
    coords = torch.stack([voxels.batch_index, x, y, run * BLOCK + z], dim=1).int()
    runs = -(-max(voxels.counts, default=0) // RUN)
    tables = {Voxels.counts.key(): voxels.counts, Voxels.cu_seqlens.key(): voxels.cu_seqlens}
    return Voxels(coords, max(1, runs) * BLOCK, voxels.batch_size, tables, check=False)


@per_grid
def sliding_plan(runs: Voxels, c: int, reach: int) -> AttentionPlan:
    """Return the plan of attention over the result of `token_runs`, with a sliding window.

    Args:
        c: 8 for compressed runs, 4 for compressed quarters of runs.
        reach: tokens that the window reaches on each side; 0 makes no window.
    """
    plan = attention_plan(runs, c, 0, 0)
    return replace(plan, windows=SlidingWindow.over(plan.samples, reach)) if reach else plan
