"""Results that are kept where a block is computed twice, because they take far longer to compute than to hold."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor


class Kept:
    """The results of the costly operations of a block: its first pass adds them, later passes take them, in order.

    `contexts` are those of torch.utils.checkpoint, which tells the passes apart.
    """

    def __init__(self):
        self._results: list[list[Tensor]] = []
        self._next: Iterator[list[Tensor]] | None = None  # in the first pass, None

    def __call__(self, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Return the results of `compute`, which runs in the first pass alone. They share memory with those kept."""
        if self._next is None:
            self._results.append([x.detach() for x in compute()])
            results = self._results[-1]
        else:
            results = next(self._next)
        return [x.detach() for x in results]  # autograd changes the tensors that an operation returns

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts of the first pass and of a later one."""
        return nullcontext(), self._later_pass()

    @contextmanager
    def _later_pass(self):
        self._next = iter(self._results)
        try:
            yield
        finally:
            self._next = None


def computed(kept: Kept | None, compute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Return the results of `compute`, or those that were kept."""
    return compute() if kept is None else kept(compute)
