"""Say in one line that this machine compiles something, which makes the first run slow and no later one."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from .kernels.compile_notice import announce_triton
from .meshes.numba_kernel import announce_numba

LOOPS = "compiling loops for this computer: only in the first run, up to a minute"
KERNELS = "compiling kernels for this GPU: only in the first run, up to a few minutes"


@contextmanager
def announce_compiling(notify: Callable[[str], object]) -> Generator[None]:
    """Call notify(LOOPS) and notify(KERNELS) in the block, each at most once, when such a compilation begins."""
    with announce_numba(lambda: notify(LOOPS)), announce_triton(lambda: notify(KERNELS)):
        yield
