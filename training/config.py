"""Configuration of the training scripts: dataclasses, read from a TOML file, with overrides from the command line.

Each script defines its own dataclass. The sizes of a network are in the config dataclass of that network in d3ds2.
"""

import sys
import tomllib
from pathlib import Path

from d3ds2.storage.dataclass_values import from_dict
from training.help_text import help_text


def load_config(cls, argv: list[str]):
    """Read the arguments `[CONFIG.toml, key=value, ...]` into the dataclass `cls`; nested keys are dotted.

    A file with `base = "other.toml"` states only what differs from that file, in the same folder or by its path.

        load_config(TrainVAEConfig, ["vae.toml", "run.steps=500", "model.hidden_size=64", "resolutions=[256, 512]"])

    `--help` among them prints what the script does and all of its keys.

    Raises:
        SystemExit: no file was given, or `--help`.
        ValueError: the file is not TOML, an override has no `=`, a key is unknown or a value has the wrong type.
        FileNotFoundError: there is no such file.
    """
    if {"-h", "--help"} & {*argv}:
        print(help_text(cls))
        sys.exit(0)
    path, *overrides = argv or sys.exit(f"usage: {sys.argv[0]} CONFIG.toml [key=value ...], or --help")
    values = read_toml(Path(path))
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


def read_toml(path: Path) -> dict:
    """Read a TOML file over that which its key `base` names, a path from the file's folder.

    Raises:
        ValueError: the file is not TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"expected TOML in {path}: {error}") from error
    base = values.pop("base", None)
    return values if base is None else _merged(read_toml(path.parent / base), values)


def _merged(below: dict, above: dict) -> dict:
    both = [name for name in above if isinstance(above[name], dict) and isinstance(below.get(name), dict)]
    return below | above | {name: _merged(below[name], above[name]) for name in both}
