"""The command line of a script: an error of its input, config, disk or libraries is one line, and the exit code 1."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from d3ds2.storage.one_line import one_line
from training.config import load_config

KNOWN_ERRORS = (OSError, ValueError, FloatingPointError, ImportError)  # of a script; each becomes one line


def split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--debug`, and whether it was among them."""
    return [argument for argument in arguments if argument != "--debug"], "--debug" in arguments


def run_command(main: Callable, config_class: type) -> NoReturn:
    """Run `main` on the config that the arguments give, then exit: 0, or 1 after an error.

    With `--debug` among the arguments, an error shows its traceback. SIGTERM, which a cluster sends before it kills a
    task, ends the script as Ctrl-C does: what is finished is kept.
    """
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
