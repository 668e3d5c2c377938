"""The help of a script: its docstring, and the keys of its config dataclass with their defaults and comments."""

import dataclasses
import inspect
import io
import sys
import tokenize
import typing
from collections.abc import Iterator

from d3ds2.storage.dataclass_values import section_of


def help_text(cls) -> str:
    """Return the docstring of the script whose config class is `cls`, and its keys with their defaults and comments."""
    rows = list(_keys(cls))
    width = min(max(len(key) for key, _, _ in rows), 32)
    lines = [f"  {key:<{width}}  {' '.join(filter(None, (default, about)))}" for key, default, about in rows]
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    return "\n".join(
        [doc, "", "Arguments: CONFIG.toml [key=value ...] [--debug]. The keys, with their defaults:", "", *lines]
    )


def _keys(cls, prefix: str = "", owner: object = dataclasses.MISSING) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, comment) of each field of a dataclass, and of the dataclasses in it."""
    comments, hints = comments_of(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, default = prefix + field.name, _default(field, owner)
        section = section_of(hints[field.name])
        if section is not None:
            if about := comments.get(field.name):
                yield f"[{key}]", "", f"# {about}"
            yield from _keys(section, f"{key}.", default)
        else:
            about = comments.get(field.name, "")
            yield key, f"= {_toml(default)}", about and f" # {about}"


def _default(field: dataclasses.Field, owner: object) -> object:
    """The default of a field: that of the object which holds it, if there is one."""
    if dataclasses.is_dataclass(owner) and not isinstance(owner, type):
        return getattr(owner, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _toml(value: object) -> str:
    """Write a default as in a config file."""
    if value is None or value is dataclasses.MISSING:
        return "(not set)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, tuple) else str(value)


def comments_of(cls) -> dict[str, str]:
    """Return the comment on the line of each field of a dataclass, by field name."""
    found, first, names = {}, {}, {field.name for field in dataclasses.fields(cls)}
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(inspect.getsource(cls))).readline):
        row = token.start[0]
        if token.type == tokenize.NAME and row not in first:
            first[row] = token.string
        if token.type == tokenize.COMMENT and first.get(row) in names:
            found.setdefault(first[row], token.string.lstrip("# "))
    return found
