"""Run a call on hostile input: it ends in a result or in one clear error, within bounds, and says nothing else."""

import logging
import os
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MORE_MEMORY = 3 << 30  # bytes of address space that a call may take
MORE_RESIDENT = 1 << 30  # bytes of memory that a call may touch


def outcome(call: Callable[[], Any], *errors: type[Exception], resident: int = MORE_RESIDENT) -> Any:
    """Return the result of a call, or the error of one of the classes `errors` that it raised.

    Fails if the call raises another error, or one whose message is not a line; if it warns, logs or writes to standard
    error; if it takes more than `resident` bytes of memory, or `MORE_MEMORY` of address space.
    """
    with limited_memory(resident), silent():
        try:
            return call()
        except errors as error:
            assert_one_line(str(error))
            return error


def assert_one_line(text: str) -> None:
    assert text and text.isprintable() and text.strip() == text, repr(text)


@contextmanager
def limited_memory(resident: int) -> Iterator[None]:
    """Bound the memory that the block may take. Where the system cannot tell, only the address space is bounded."""
    before = _status("VmRSS")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MORE_MEMORY, hard))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the greatest VmRSS so far
        can_tell = True
    except OSError:
        can_tell = False
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if can_tell:
        taken = _status("VmHWM") - before
        assert taken <= resident, f"took {taken >> 20} MiB"


@contextmanager
def silent() -> Iterator[None]:
    """Fail if the block warns, logs a warning, or writes to standard error, from Python or from a C library."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        logging.getLogger().addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                yield
        finally:
            logging.getLogger().removeHandler(handler)
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        said += [str(warning.message) for warning in warned] + file.read().decode(errors="replace").splitlines()
    assert not said, said


@contextmanager
def as_nobody(*paths: Path) -> Iterator[None]:
    """Let the block run without the rights of root, but able to enter the parents of `paths`."""
    for parent in {parent for path in paths for parent in path.parents}:
        if parent.owner() == paths[0].owner():  # pytest makes its folders for their user alone
            parent.chmod(parent.stat().st_mode | 0o011)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def _status(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10
