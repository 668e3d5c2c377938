"""Plain values from JSON or TOML -> dataclasses; an unknown key or a wrong type is an error."""

import dataclasses
import types
import typing
from typing import Any


def from_dict(cls, values: dict, prefix: str = ""):
    """Build a dataclass, which may contain others, from plain values.

    Args:
        cls: the dataclass.
        values: by field name.
        prefix: stands before the keys in messages, such as "sampling.".

    Raises:
        ValueError: a key is unknown, a value has the wrong type, or the dataclass itself refuses its values. The
            message has the full key.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - known.keys()):
        names = ", ".join(prefix + name for name in unknown)
        raise ValueError(f"unknown key {names} of {cls.__name__}; known: {', '.join(known)}")
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def section_of(hint: Any) -> type | None:
    """Return the dataclass that an annotation names, as `Section` or `Section | None`; None for any other."""
    return next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Convert a value to the annotation `hint`: an int to a float, a list to a tuple, a table to a dataclass."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong_type(key, f"a section [{key}]", value)
        return from_dict(hint, value, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        section = section_of(hint)
        if section is not None and isinstance(value, dict):
            return _convert(section, value, key)  # its own errors say more
        for argument in arguments:
            try:
                return _convert(argument, value, key)
            except ValueError:
                continue
        raise _wrong_type(key, hint, value)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{key}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(key, hint, value)
        each = arguments[:1] * len(value) if arguments[1:] == (Ellipsis,) else arguments
        if len(each) != len(value):
            raise _wrong_type(key, hint, value)
        return tuple(_convert(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(each, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(key, hint, value)
        return {name: _convert(arguments[1], v, f"{key}.{name}") for name, v in value.items()}
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{key}: expected a number below 1e308, got one of {len(str(value))} digits") from None
    if type(value) is not hint:  # not isinstance: a bool is not an int here
        raise _wrong_type(key, hint, value)
    return value


def _wrong_type(key: str, hint: Any, value: Any) -> ValueError:
    expected = hint if isinstance(hint, str) else getattr(hint, "__name__", None) or str(hint)
    if typing.get_args(hint):
        expected = str(hint)
    return ValueError(f"{key}: expected {expected}, got {value!r} ({type(value).__name__})")
