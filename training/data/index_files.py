"""The index of a `data_dir`: the shapes that prepare_shapes has made. Imports no torch.

A run without shards writes index.json, and task i of an array of n writes index.<i>-of-<n>.json. Readers merge all of
them, so tasks never write to the same file. Each file is a list of records:

    {"name", "source", "split", "num_tokens": {"256": 2034}, "checksums": {"256": "8a1f..."}, "meshes": FOLDER}

`meshes` is the folder that the mesh came from. Records of other folders stay when a folder is prepared again.
score_meshes adds "scores" and "about"; each script keeps the keys of the other.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from d3ds2.storage.atomic_file import replacing
from training.data.shards import Shard


def index_files(data_dir: str | Path) -> list[Path]:
    """The index files of a folder; index.json first."""
    own = Path(data_dir) / "index.json"
    return [own] * own.is_file() + sorted(Path(data_dir).glob("index.*-of-*.json"))


def read_index(data_dir: str | Path) -> list[dict]:
    """Read the records of all index files, sorted by name.

    Raises:
        FileNotFoundError: `data_dir` was not made by prepare_shapes.
        ValueError: an index file is damaged.
    """
    files = index_files(data_dir)
    if not files:
        missing = Path(data_dir) / "index.json"
        raise FileNotFoundError(f"expected {missing}; make it with python -m training.prepare_shapes")
    by_name = {record["name"]: record for file in files for record in read_records(file)}
    return [by_name[name] for name in sorted(by_name)]


def read_records(file: Path) -> list[dict]:
    """Read one index file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        records = json.loads(file.read_text())
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise _damaged(file, "which is not a list of records with name, source, split and num_tokens")
    return records


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"damaged index {file} ({reason}); make it again with python -m training.prepare_shapes")


def _is_record(record) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("num_tokens"), dict):
        return False
    texts = (record.get(key) for key in ("name", "source", "split"))
    tokens = record["num_tokens"].values()
    return all(isinstance(text, str) for text in texts) and all(type(n) is int and n > 0 for n in tokens)


def update_index(
    data_dir: str | Path,
    shard: Shard,
    records: Iterable[dict],
    is_gone: Callable[[dict], bool],
    in_others: bool = True,
) -> None:
    """Put records into this task's index file; take records that are gone out of every index file.

    A record keeps those keys of an older one of its name that it does not have itself. Without `in_others`, only this
    task's file is read and written, as a running task does now and then.

    All other records stay. A name is listed in one file: its record leaves the others after it has been written
    here. An index file that is damaged is renamed to *.damaged, and its name is printed.

    Raises:
        OSError: the folder cannot be written to. The index is then what it was.
    """
    data_dir, own = Path(data_dir), shard.file(Path(data_dir) / "index.json")
    new = {record["name"]: record for record in records}
    with _locked(data_dir):
        known = {record["name"]: record for record in _records_or_none(own)}
        others = [file for file in index_files(data_dir) if file != own] if in_others else []
        listed = {file: _records_or_none(file) for file in others}
        older = {r["name"]: r for records in listed.values() for r in records if r["name"] in new}
        for name, record in new.items():
            before = {"num_tokens": {}} | older.get(name, {}) | known.get(name, {})
            new[name] = record | {key: value for key, value in before.items() if key not in record}
        _write(own, [r for name, r in (known | new).items() if name in new or not is_gone(r)])
        for file, records in listed.items():
            kept = [r for r in records if r["name"] not in new and not is_gone(r)]
            if len(kept) < len(records):
                _write(file, kept)


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


@contextlib.contextmanager
def _locked(data_dir: Path) -> Generator[None]:
    """Keep other tasks from changing the index meanwhile, where the system and its files can.

    Where they cannot, tasks of one array still keep apart, since each has its own file.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    with open(data_dir / ".index.lock", "w") as file:
        with contextlib.suppress(OSError):  # a network folder without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
