"""Data parallel runs: ranks started by torchrun, one for each device, compute every step together.

    torchrun --nproc-per-node 8 -m training.train_dit training/configs/tiny_dit.toml data_dir=data/mine batch_size=64

Every rank holds the whole state. The batch of a step is cut into ranks × `run.accumulate` parts; each rank computes its
parts one after the other, and then the gradients are summed over the ranks. Parts weigh as much as their share of the
values over which the loss takes its means, so the sum is the gradient of the whole batch (`training.data.parts`).

The sum is taken after the last backward pass, not during it as in DistributedDataParallel. It is then exact for any
number of parts, even for a rank that has none in a step, and one sum of at most 2.2 GB costs little beside a step.

Small agreements, such as whether to stop, go through the CPU (gloo), so that no rank waits for its device; sums of
gradients and losses go through the devices (nccl on CUDA). With `run.sharded`, FSDP2 sums them instead
(`training.sharding`).

A rank that dies closes its connections, which ends the others at their next agreement. A rank may wait for its device
instead, which waits for the dead rank. So a thread of each rank waits for a word of the rank before it, which comes at
the end of its work; if that rank dies, the thread ends this one, and so on around the ring.
"""

import contextlib
import os
import sys
import threading
import time
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
from training.command import KNOWN_ERRORS, end_with_parent, split_debug
from training.config import load_config
from training.folder_lock import FolderInUseError

BUCKET = 1 << 25  # gradient values that are summed at once, 128 MiB
PATIENCE = timedelta(hours=2)  # for a rank that is behind; the death of one is noticed at once
GRACE_SECONDS = 10.0  # for a rank to notice the death of another by itself


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
        background: for agreements on the CPU between threads that write checkpoints; None where torchrun has started no
            ranks.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: Any = None
    background: Any = None

    @property
    def is_joined(self) -> bool:
        """Whether torchrun has started this rank; it may be the only one."""
        return self.background is not None

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
    """Return the shard of a tensor, of any shape, that this rank holds, in place; one that is not sharded is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# --- start and end


def join() -> Callable[[], None]:
    """Connect with the other ranks if torchrun has started this one; agreements then go through the CPU.

    Returns:
        A function to call at the end of the work.
    """
    if not dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return lambda: None
    dist.init_process_group("gloo", timeout=PATIENCE)
    return _watch() if dist.get_world_size() > 1 else dist.destroy_process_group


def _watch() -> Callable[[], None]:
    """Start the thread that waits for the rank before this one; return the function that lets the next one end."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    rank, size = dist.get_rank(), dist.get_world_size()

    def wait_for_word() -> None:
        try:
            dist.recv(torch.zeros(1), (rank - 1) % size, group)
        except RuntimeError:
            time.sleep(GRACE_SECONDS)
            _say(LostRankError())
            os._exit(1)

    watching = threading.Thread(target=wait_for_word, daemon=True)
    watching.start()

    def end() -> None:
        with connected():
            dist.send(torch.zeros(1), (rank + 1) % size, group)
        watching.join()
        dist.destroy_process_group()

    return end


def ranks_on(name: str) -> Ranks:
    """Return the ranks that have joined, or this process alone.

    Args:
        name: the kind of device, such as "auto". Each of several ranks takes the GPU of its number on its machine.

    Raises:
        ValueError: the device is not there, or is of a kind on which several ranks cannot compute.
    """
    if not dist.is_initialized():
        return Ranks(find_device(name))
    device = find_device(name, int(os.environ["LOCAL_RANK"]))
    backend = sums_between(device)
    group = None if backend == dist.get_backend() else dist.new_group(backend=backend, timeout=PATIENCE)
    return Ranks(device, dist.get_rank(), dist.get_world_size(), group, dist.new_group(backend="gloo"))


RANK_ERRORS = (*KNOWN_ERRORS, ArithmeticError, FolderInUseError, LostRankError, torch.OutOfMemoryError)


def run_script(work: Callable[[Any], Any], config_class: type, arguments: list[str]) -> None:
    """Run a script: read its config, do its work on every rank, and exit. `--debug` shows the traceback of an error."""
    end_with_parent()
    wanted, debug = split_debug(arguments)
    run_ranks(lambda: work(load_config(config_class, wanted)), debug)


def run_ranks(work: Callable[[], Any], debug: bool = False) -> None:
    """Join the other ranks, work, and exit.

    A known kind of error becomes one line, which only the first rank to fail prints. If a rank has been killed, each
    of the others prints a line.
    """
    try:
        end = join()
        code = _exit_code(work)
        if code == 0:
            end()
    except KeyboardInterrupt:
        code = 130
    except RANK_ERRORS as error:
        code = 1
        if debug:
            traceback.print_exc()
        _say(error, silent=debug)
    except Exception as error:
        code = 1
        traceback.print_exc()
        _say(error, silent=True)
    if code and dist.is_initialized():  # nccl may wait for a rank that has ended
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(work: Callable[[], Any]) -> int:
    """Work; return the exit code that it asks for by `sys.exit`, else 0."""
    try:
        work()
    except SystemExit as asked:
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr, flush=True)
            return 1
        return asked.code or 0
    return 0


def _say(error: Exception, silent: bool = False) -> None:
    """Print the line of an error, unless another rank has said why the run ends; the ranks count who has.

    The death of another rank is no reason but what follows from one.
    """
    is_lost = isinstance(error, LostRankError)
    if (number := _count_reasons(0 if is_lost else 1)) is None:
        is_told = not is_lost and int(os.environ.get("RANK", "0")) > 0
    else:
        is_told = number > (0 if is_lost else 1)
    if not silent and not is_told:
        print(f"error: {_line(error)}", file=sys.stderr, flush=True)


def _count_reasons(more: int) -> int | None:
    """Add to the number of ranks that have said why the run ends; None where the ranks are not connected."""
    if not dist.is_initialized():
        return None
    try:
        return dist.distributed_c10d._get_default_store().add("reasons", more)
    except RuntimeError:  # the store has ended too
        return None


def _line(error: Exception) -> str:
    """The message of an error, in one line."""
    if isinstance(error, LostRankError):
        return (
            f"rank {dist.get_rank()} ends, because another has; the same command continues from the newest checkpoint"
        )
    message = one_line(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        message += "; lower batch_size or max_tokens, or raise run.accumulate"
    return message
