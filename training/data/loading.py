"""Load the batches of a dataset in worker processes, and move them to the device."""

import os
import signal
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels.devices import copies_in_background
from training.data.damaged_files import TooManyDamagedError


def load_batches(dataset: Dataset, first_step: int, last_step: int, workers: int, device: torch.device) -> Iterator:
    """Yield the batches of steps [first_step, last_step) on the device; each is copied while the previous step runs."""
    loader = DataLoader(
        dataset,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=copies_in_background(device),
        prefetch_factor=4 if workers else None,
        # forked workers share the parent's caches without copying them
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_start_worker,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            yield to_device(batch, device)
    except TooManyDamagedError as error:  # one line, without the traceback of the worker process
        raise TooManyDamagedError(str(error).strip().rpartition(f"{TooManyDamagedError.__name__}: ")[2]) from None
    finally:
        if workers:  # else an error keeps them alive, and they ignore the signal that ends them at exit
            batches._shutdown_workers()


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles these, and stops its workers
        signal.signal(number, signal.SIG_IGN)


def to_device(batch, device: torch.device):
    """Move a batch or a tensor to the device, if possible without waiting for the copy."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=copies_in_background(device))
    if isinstance(batch, Voxels):
        return batch.map(lambda tensor: to_device(tensor, device))
    return type(batch)(*(to_device(b, device) if isinstance(b, Tensor | Voxels | tuple) else b for b in batch))
