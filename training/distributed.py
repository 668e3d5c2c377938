"""Data parallel runs: ranks started by torchrun, one for each device, compute every step together.

    torchrun --nproc-per-node 8 -m training.train_dit training/configs/tiny_dit.toml data_dir=data/mine batch_size=64

Every rank holds the whole state. The batch of a step is cut into ranks × `run.accumulate` parts; each rank computes its
parts one after the other, and then the gradients are summed over the ranks. Parts weigh as much as their share of the
values over which the loss takes its means, so the sum is the gradient of the whole batch (`training.data.parts`).

The sum is taken after the last backward pass, not during it as in DistributedDataParallel. It is then exact for any
number of parts, even for a rank that has none in a step, and one sum of at most 2.2 GB costs little beside a step.

Small agreements, such as whether to stop, go through the CPU (gloo), so that no rank waits for its device; sums of
gradients and losses go through the devices (nccl on CUDA). A rank that dies closes its connections, which ends the
others at their next agreement.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d3ds2.kernels.devices import find_device, sums_between
from d3ds2.storage.one_line import one_line
from training.command import split_debug
from training.config import load_config
from training.folder_lock import FolderInUseError

BUCKET = 1 << 25  # gradient values that are summed at once, 128 MiB
PATIENCE = timedelta(hours=2)  # for a rank that is behind; the death of one is noticed at once


class LostRankError(RuntimeError):
    """Another rank has ended."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        device: of this rank.
        rank: the number of this one, from 0.
        size: how many there are.
        group: for sums on the devices; None: the same as on the CPU.
        background: for agreements on the CPU between threads that write checkpoints; None for one process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: Any = None
    background: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(_reduced(torch.tensor(int(flag)), dist.ReduceOp.MAX))

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor of the device, of any shape, by its sum over the ranks, and return it."""
        return tensor if self.size == 1 else _reduced(tensor, dist.ReduceOp.SUM, self.group)

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    def from_first(self, value: Any) -> Any:
        """Return the value of the first rank; any small object."""
        return self.all(value)[0]

    def all(self, value: Any) -> list:
        """Return the values of all ranks, in order; small objects."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        with connected():
            dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of the device, of any shape, by those of the first rank."""
        if self.size > 1:
            with torch.no_grad(), connected():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    dist.broadcast(whole, 0, group=self.group)
                    tensor.copy_(whole)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients over the ranks. A parameter keeps None only if it has no gradient on any rank."""
        if self.size == 1:
            return
        present = _reduced(torch.tensor([p.grad is not None for p in parameters]).int(), dist.ReduceOp.MAX)
        for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for gradients in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = self.sum(torch.cat([g.flatten() for g in gradients]))
            summed = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [s.view_as(g) for s, g in zip(summed, gradients, strict=True)])


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list of tensors where BUCKET values are exceeded."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _reduced(tensor: Tensor, operation, group=None) -> Tensor:
    with connected():
        dist.all_reduce(tensor, operation, group=group)
    return tensor


@contextlib.contextmanager
def connected() -> Generator[None]:
    """Turn an error of the connection into a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError("another rank has ended") from error


def own_part(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this rank holds, in place; a tensor that is not sharded is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# --- start and end


def join() -> None:
    """Connect with the other ranks if torchrun has started several; agreements then go through the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)


def ranks_on(name: str) -> Ranks:
    """Return the ranks that have joined, or this process alone.

    Args:
        name: the kind of device, such as "auto". Each of several ranks takes the GPU of its number on its machine.

    Raises:
        ValueError: the device is not there, or is of a kind on which several ranks cannot compute.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks(find_device(name))
    device = find_device(name, int(os.environ["LOCAL_RANK"]))
    backend = sums_between(device)
    group = None if backend == dist.get_backend() else dist.new_group(backend=backend, timeout=PATIENCE)
    return Ranks(device, dist.get_rank(), dist.get_world_size(), group, dist.new_group(backend="gloo"))


def run_script(work: Callable[[Any], Any], config_class: type, arguments: list[str]) -> None:
    """Run a script: read its config, do its work on every rank, and exit. `--debug` shows the traceback of an error."""
    wanted, debug = split_debug(arguments)
    run_ranks(lambda: work(load_config(config_class, wanted)), debug)


def run_ranks(work: Callable[[], Any], debug: bool = False) -> None:
    """Join the other ranks, work, and exit.

    A known kind of error becomes one line, which only the first rank to fail prints.
    """
    code = 0
    try:
        join()
        work()
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, ArithmeticError, FolderInUseError, LostRankError, torch.OutOfMemoryError) as error:
        is_first, code = _is_first_to_fail(), 1
        if debug:
            traceback.print_exc()
        elif is_first:
            print(f"error: {_line(error)}", file=sys.stderr, flush=True)
    except Exception:
        _is_first_to_fail()  # the others then end in silence
        code = 1
        traceback.print_exc()
    if dist.is_initialized():
        if code:  # nccl may wait for a rank that has ended
            sys.stdout.flush()
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)


def _line(error: BaseException) -> str:
    """The message of an error, in one line."""
    if isinstance(error, LostRankError):
        return "another rank has ended; the same command continues from the newest checkpoint"
    message = one_line(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        message += "; lower batch_size or max_tokens, or raise run.accumulate"
    return message


def _is_first_to_fail() -> bool:
    """Whether this rank is the first to fail; all ranks count in the store that connected them."""
    if not dist.is_initialized():
        return int(os.environ.get("RANK", "0")) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store has ended too
        return True
