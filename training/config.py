"""Configuration of the training scripts: dataclasses, read from a TOML file, with overrides from the command line.

Each script has its own dataclass beside its loop; the sizes of a network are the dataclass of d3ds2 that builds it.
"""

import dataclasses
import sys
import tomllib
import types
import typing
from typing import Any


def load_config(cls, argv: list[str]):
    """Read `[CONFIG.toml, key=value, ...]` into the dataclass `cls`; keys of nested dataclasses are dotted.

        load_config(TrainVAEConfig, ["vae.toml", "run.steps=500", "model.hidden_size=64", "resolutions=[256, 512]"])

    Raises:
        SystemExit: no file was named.
        ValueError: the file is not TOML, an override has no `=`, a key is unknown or a value has the wrong type.
        FileNotFoundError: there is no such file.
    """
    path, *overrides = argv or sys.exit(f"usage: {sys.argv[0]} CONFIG.toml [key=value ...]")
    with open(path, "rb") as file:
        try:
            values = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"expected TOML in {path}: {error}") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"expected an override as key=value, got {override!r}")
        *sections, name = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ValueError(f"expected a section {section} for the override {override!r}, got the value {table!r}")
        try:
            table[name] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            table[name] = value  # a bare string
    return from_dict(cls, values)


def from_dict(cls, values: dict, prefix: str = ""):
    """Build a (nested) dataclass of plain values; `prefix` is the key of `values` in the whole, for messages.

    Raises:
        ValueError: an unknown key or a value of the wrong type, by its full key; or what the dataclass itself raises.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - known.keys()):
        names = ", ".join(prefix + name for name in unknown)
        raise ValueError(f"unknown key {names} of {cls.__name__}; known: {', '.join(known)}")
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotation `hint` wants it: int becomes float, a list becomes a tuple, a table a dataclass."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong_type(key, f"a section [{key}]", value)
        return from_dict(hint, value, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
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
        return float(value)
    if type(value) is not hint:  # type, not isinstance: a bool is no int
        raise _wrong_type(key, hint, value)
    return value


def _wrong_type(key: str, hint: Any, value: Any) -> ValueError:
    expected = hint if isinstance(hint, str) else getattr(hint, "__name__", None) or str(hint)
    if typing.get_args(hint):
        expected = str(hint)
    return ValueError(f"{key}: expected {expected}, got {value!r} ({type(value).__name__})")
