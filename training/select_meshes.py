"""Scores in the index -> a list of names, for `names=` of prepare_shapes and render_views.

    python -m training.select_meshes training/configs/select_meshes.toml data_dir=DATA names=DATA/names.txt

A mesh is taken if it fulfils all conditions of the config. A condition compares one value of its record with a number
or a text: a score ("closed >= 0.9"), `tokens_256` and so on ("tokens_256 <= 60000"), `source`, `split`, or what is
known about the mesh ("licence = CC0-1.0"; `title`, `author`, `category`, `url`). "in" takes one of several texts,
separated by commas. A mesh without the value is left out. How many meshes each condition leaves out is printed.

After prepare_shapes, `out=DATA/chosen` makes a data_dir of the chosen shapes for the trainers, without a copy: an index
of its own, and links to the folders of shapes and views. Its latents are its own.
"""

import json
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from d3ds2.storage.atomic_file import replacing
from training.command import run_command
from training.data.index_files import read_index
from training.data.name_lists import write_names

CONDITION = re.compile(r"(\w+)\s*(<=|>=|!=|<|>|=|\bin\b)\s*(.+)")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq, "!=": operator.ne,
    "in": lambda value, texts: value in texts,
}  # fmt: skip


class Condition(NamedTuple):
    """A condition on one value of a record."""

    key: str
    operator: str
    value: Any  # a number, a text, or a list of texts

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read a condition such as "closed >= 0.9".

        Raises:
            ValueError: the text is not of this form, or orders texts.
        """
        found = CONDITION.fullmatch(text.strip())
        if not found:
            raise ValueError(f"expected a condition such as 'closed >= 0.9', got {text!r}")
        key, sign, value = found.groups()
        if sign == "in":
            return cls(key, sign, [part.strip() for part in value.split(",")])
        try:
            return cls(key, sign, float(value))
        except ValueError:
            if sign not in ("=", "!="):
                raise ValueError(f"expected a number after {sign} in the condition {text!r}") from None
            return cls(key, sign, value)

    def holds(self, values: dict[str, Any]) -> bool:
        """Whether the condition holds for the values of a record; not where the value is missing or no number."""
        value = values.get(self.key)
        if value is None or (isinstance(value, str) and isinstance(self.value, float)):
            return False
        return OPERATORS[self.operator](value, self.value)

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return f"{self.key} {self.operator} {', '.join(value) if isinstance(value, list) else value}"


@dataclass(frozen=True)
class SelectMeshesConfig:
    data_dir: str = "data"
    names: str = "names.txt"  # the file to write
    out: str = ""  # folder to write too: a data_dir for the trainers that has the chosen shapes alone; "": none
    conditions: tuple[str, ...] = field(default_factory=tuple)  # a mesh must fulfil them all

    def __post_init__(self):
        for condition in self.conditions:
            Condition.parse(condition)


def values_of(record: dict) -> dict[str, Any]:
    """Return the values of a record that conditions may name."""
    tokens = {f"tokens_{resolution}": number for resolution, number in record["num_tokens"].items()}
    return record.get("about", {}) | record.get("scores", {}) | tokens | {k: record[k] for k in ("source", "split")}


def link_chosen(data_dir: Path, out: Path, names: set[str]) -> None:
    """Make a data_dir of these shapes alone, whose shapes and views are links to those of `data_dir`.

    Raises:
        ValueError: none of them is prepared, or `out` is a data_dir with files of its own.
        OSError: `out` cannot be written to.
    """
    chosen = [r for r in read_index(data_dir) if r["name"] in names and r["num_tokens"]]
    if not chosen:
        raise ValueError(f"expected prepared shapes among the chosen ones in {data_dir}, got none: run prepare_shapes")
    out.mkdir(parents=True, exist_ok=True)
    for part in ("shapes", "views"):
        link, target = out / part, (data_dir / part).resolve()
        if link.resolve() == target:
            continue
        if link.exists():
            raise ValueError(f"expected no folder or a link to {target} at {link}, got another one")
        if target.is_dir():
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)
    with replacing(out / "index.json") as temporary:
        temporary.write_text(json.dumps(chosen, indent=1))


def main(config: SelectMeshesConfig) -> list[str]:
    """Write the list of names, and the folder `out`; return the names.

    Raises:
        FileNotFoundError: `data_dir` has no index.
        ValueError: the index is damaged, or no mesh fulfils the conditions; then the list is not changed.
        OSError: the list or the folder cannot be written.
    """
    records = {record["name"]: values_of(record) for record in read_index(config.data_dir)}
    conditions = [Condition.parse(text) for text in config.conditions]
    for condition in conditions:
        left_out = sum(not condition.holds(values) for values in records.values())
        without = sum(condition.key not in values for values in records.values())
        missing = f", {without} of them without {condition.key}" if without else ""
        print(f"{condition}: leaves out {left_out} of {len(records)}{missing}", file=sys.stderr)
    names = [name for name, values in records.items() if all(condition.holds(values) for condition in conditions)]
    if not names:
        raise ValueError(f"expected meshes that fulfil all conditions in {config.data_dir}, got none of {len(records)}")
    write_names(config.names, names)
    if config.out:
        link_chosen(Path(config.data_dir), Path(config.out), set(names))
    print(f"{len(names)} of {len(records)} names written to {config.names}")
    return names


if __name__ == "__main__":
    run_command(main, SelectMeshesConfig)
