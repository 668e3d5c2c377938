"""The command line of a script: an error of its input, config, disk or libraries is one line, and the exit code 1."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from d3ds2.storage.one_line import one_line
from training.config import load_config

PARENT = "D3DS2_PARENT"  # environment variable: the process with which a script ends
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
KNOWN_ERRORS = (OSError, ValueError, FloatingPointError, ImportError)  # of a script; each becomes one line


def end_with_parent() -> None:
    """Let Linux stop this process, as SIGTERM does, when the process ends that started it and is named in `PARENT`.

    The script asks for it, and not its parent between fork and exec, where a parent with threads may hang.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


def split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--debug`, and whether it was among them."""
    return [argument for argument in arguments if argument != "--debug"], "--debug" in arguments


def run_command(main: Callable, config_class: type) -> NoReturn:
    """Run `main` on the config that the arguments give, then exit: 0, or 1 after an error.

    With `--debug` among the arguments, an error shows its traceback. SIGTERM, which a cluster sends before it kills a
    task, ends the script as Ctrl-C does: what is finished is kept.
    """
    end_with_parent()
    arguments, debug = split_debug(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        main(load_config(config_class, arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except KNOWN_ERRORS as error:
        if debug:
            raise
        sys.exit(f"error: {one_line(error)}")
    sys.exit(0)
