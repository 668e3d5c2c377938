"""The index of a `data_dir`: the shapes that prepare_shapes has made. Imports no torch.

A run without shards writes index.json, and task i of an array of n writes index.<i>-of-<n>.json. Readers merge all of
them, so tasks never write to the same file. Each file is a list of records:

    {"name", "source", "split", "num_tokens": {"256": 2034}, "checksums": {"256": "8a1f..."}, "meshes": FOLDER}

`meshes` is the folder that the mesh came from. Records of other folders stay when a folder is prepared again.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from d3ds2.storage.atomic_file import replacing
from training.data.packs import open_data
from training.data.shards import Shard
from training.folder_lock import locked

MARK, END = re.compile(r"\s*([\[,])\s*"), re.compile(r"\s*\]\s*")  # between the records of a file, and after them


def index_files(data_dir: str | Path) -> list[Path]:
    """The index files of a folder; index.json first."""
    folder = open_data(data_dir)
    own = folder / "index.json"
    return [own] * own.is_file() + sorted(folder.glob("index.*-of-*.json"))


def read_index(data_dir: str | Path, keep: Callable[[dict], Any] = lambda record: record) -> list:
    """Read the records of all index files, sorted by name.

    Args:
        keep: returns what to keep of a record, so that millions of them need little memory; None to leave it out.

    Raises:
        FileNotFoundError: `data_dir` was not made by prepare_shapes.
        ValueError: an index file is damaged.
    """
    files = index_files(data_dir)
    if not files:
        missing = open_data(data_dir) / "index.json"
        raise FileNotFoundError(f"expected {missing}; make it with python -m training.prepare_shapes")
    by_name = {record["name"]: keep(record) for file in files for record in each_record(file)}
    return [by_name[name] for name in sorted(by_name) if by_name[name] is not None]


def read_records(file: Path) -> list[dict]:
    """Read one index file.

    Raises:
        ValueError: the file is damaged.
    """
    return list(each_record(file))


def each_record(file: Path) -> Iterator[dict]:
    """Read one index file, and yield its records one after the other.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        text, decode, place, mark = file.read_text(), json.JSONDecoder().raw_decode, 0, "["
        while True:
            found = MARK.match(text, place)
            if found is None or found[1] != mark:
                raise ValueError(f"expected {mark!r} at character {place}")
            if mark == "[" and text.startswith("]", found.end()):
                return
            record, place = decode(text, found.end())
            if not _is_record(record):
                raise ValueError("which is not a list of records with name, source, split and num_tokens")
            yield record
            mark = ","
            if END.fullmatch(text, place):
                return
    except ValueError as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"damaged index {file} ({reason}); make it again with python -m training.prepare_shapes")


def _is_record(record) -> bool:
    if type(record) is not dict or type(record.get("num_tokens")) is not dict:
        return False
    for key in ("name", "source", "split"):
        if type(record.get(key)) is not str:
            return False
    for tokens in record["num_tokens"].values():  # noqa: SIM110, twice as fast as all() on half a million records
        if type(tokens) is not int or tokens <= 0:
            return False
    return True


def update_index(
    data_dir: str | Path,
    shard: Shard,
    records: Iterable[dict],
    is_gone: Callable[[dict], bool],
    in_others: bool = True,
) -> None:
    """Put records into this task's index file; take records that are gone out of every index file.

    Without `in_others`, only this task's file is read and written, as a running task does now and then.

    All other records stay. A name is listed in one file: its record leaves the others after it has been written
    here. An index file that is damaged is renamed to *.damaged, and its name is printed.

    Raises:
        OSError: the folder cannot be written to. The index is then what it was.
    """
    data_dir, own = Path(data_dir), shard.file(Path(data_dir) / "index.json")
    new = {record["name"]: record for record in records}
    with locked(data_dir, wait=True, name=".index.lock"):
        known = {record["name"]: record for record in _records_or_none(own)}
        _write(own, [r for name, r in (known | new).items() if name in new or not is_gone(r)])
        for other in index_files(data_dir) if in_others else []:
            listed = _records_or_none(other) if other != own else []
            kept = [r for r in listed if r["name"] not in new and not is_gone(r)]
            if len(kept) < len(listed):
                _write(other, kept)


def _records_or_none(file: Path) -> list[dict]:
    """The records of an index file; none of a missing one, nor of a damaged one, which is moved aside."""
    try:
        return read_records(file)
    except FileNotFoundError:
        return []
    except ValueError as error:
        aside = file.with_name(f"{file.name}.damaged")
        file.replace(aside)
        print(f"{error}: moved to {aside}", file=sys.stderr)
        return []


def _write(file: Path, records: list[dict]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(sorted(records, key=lambda record: record["name"]), indent=1))
