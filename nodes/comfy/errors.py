"""The texts that a node sends to the browser: one line each, in which nothing can be taken for HTML.

Names of files and models, and what a mesh file says of itself, come from anywhere. Old front ends show texts as HTML.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

NO_TAGS = str.maketrans("<>", "‹›")


def without_tags(text: object) -> str:
    """Return a text, or the message of an error, as one line without angle brackets."""
    from ...d3ds2.storage.one_line import one_line

    return one_line(text).translate(NO_TAGS)


def plain_errors(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Let a node's `execute` send errors without tags.

    Raises:
        ValueError: what `execute` raised was one, or an error about a file.
    """

    @wraps(execute)
    def run(*args: Any, **inputs: Any) -> Any:
        try:
            return execute(*args, **inputs)
        except OSError as error:
            name = "" if error.filename is None else f": {error.filename}"
            raise ValueError(without_tags(f"{error.strerror or error}{name}")) from error
        except ValueError as error:
            raise ValueError(without_tags(error)) from error

    return run
