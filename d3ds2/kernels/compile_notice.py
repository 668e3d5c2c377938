"""Say that Triton compiles kernels: it takes seconds to a minute in the first run on a machine, and in no later one.

Triton keeps machine code in ~/.triton, and tells hooks before and after it makes a kernel ready, be it from there or by
compiling. Reading takes milliseconds, so what takes longer was compiled.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from .devices import HAS_TRITON

READING_SECONDS = 0.3  # at most, for a kernel that is on disk


@contextmanager
def announce_triton(notify: Callable[[], object]) -> Generator[None]:
    """Call notify() once in the block, when a kernel turns out to have been compiled: others will follow."""
    if not (HAS_TRITON and torch.cuda.is_available()):
        yield
        return
    hooks, before, after = _hooks()
    saved = getattr(hooks, before), getattr(hooks, after)
    started = [0.0]

    def begin(*arguments: Any, **more: Any) -> None:
        started[0] = time.monotonic()

    def end(*arguments: Any, **more: Any) -> None:
        if started[0] and time.monotonic() - started[0] > READING_SECONDS:
            notify()
            setattr(hooks, before, saved[0])
            setattr(hooks, after, saved[1])

    if any(hook is not None for hook in saved):  # another program listens; there is place for one
        yield
        return
    setattr(hooks, before, begin)
    setattr(hooks, after, end)
    try:
        yield
    finally:
        setattr(hooks, before, saved[0])
        setattr(hooks, after, saved[1])


def _hooks() -> tuple[Any, str, str]:
    """Return the object that holds Triton's hooks, and the names of those before and after a kernel is made ready."""
    import triton

    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)  # since Triton 3.4
    if runtime is not None:
        return runtime, "jit_cache_hook", "jit_post_compile_hook"
    return triton.JITFunction, "cache_hook", "compiled_hook"
