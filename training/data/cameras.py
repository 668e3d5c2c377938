"""The cameras of all views, in a table that opens quickly.

`views/<name>/cameras.json` says how each picture of a shape was taken. Half a million of them take minutes to read, so
`views.safetensors` in the `data_dir` keeps what training needs of each, with the size and the time of the file that it
was read from. A file that has changed since is read again; then the table is written again, if the folder allows it.

Sizes: n shapes, P pictures of all of them.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.data.array_files import DamagedFileError, read_arrays, write_arrays
from training.data.damaged_files import DamagedFiles
from training.data.packs import PackedPath, load_entries, open_data
from training.data.symmetry import MIRROR, NUM_SYMMETRIES, facing

TABLE = "views.safetensors"
MANY = 1000  # shapes from which on a table is written
READ_AT_ONCE = 512  # files that a thread reads one after the other
THREADS = 32  # most of the time they wait for the disk


class Table(NamedTuple):
    """The pictures of n shapes, a row for each."""

    names: list[str]
    lists: list[list[str]]  # names of picture files; nearly all shapes share one list
    list_of: np.ndarray  # (n,) int32: the place of a shape's list
    first: np.ndarray  # (n + 1,) int64: the number of its first picture, among all
    turns: np.ndarray  # (P,) uint8: the quarter turns that bring the camera of a picture to the front
    stamps: np.ndarray  # (n, 2) int64: bytes of cameras.json, and when it was written in ns

    @classmethod
    def of(cls, rows: list[tuple[str, list[str], list[int], tuple[int, int]]]) -> "Table":
        """Make a table of rows: name, picture files, turns, stamp."""
        place: dict[tuple[str, ...], int] = {}
        list_of = [place.setdefault(tuple(files), len(place)) for _, files, _, _ in rows]
        turns = [turns for _, _, turns, _ in rows]
        return cls(
            [name for name, *_ in rows],
            [list(files) for files in place],
            np.array(list_of, dtype=np.int32),
            np.cumsum([0, *map(len, turns)]),
            np.array([turn for some in turns for turn in some], dtype=np.uint8),
            np.array([stamp for *_, stamp in rows], dtype=np.int64).reshape(-1, 2),
        )

    def select(self, rows: np.ndarray) -> "Table":
        """The table of these rows (m,)."""
        counts = np.diff(self.first)[rows]
        first = np.concatenate([[0], np.cumsum(counts)])
        pictures = np.arange(first[-1]) + (self.first[rows] - first[:-1]).repeat(counts)
        names = [self.names[row] for row in rows.tolist()]
        return Table(names, self.lists, self.list_of[rows], first, self.turns[pictures], self.stamps[rows])

    def extended(self, other: "Table") -> "Table":
        """The table with the rows of another below its own."""
        return Table(
            self.names + other.names,
            self.lists + other.lists,
            np.concatenate([self.list_of, other.list_of + len(self.lists)]),
            np.concatenate([self.first, self.first[-1] + other.first[1:]]),
            np.concatenate([self.turns, other.turns]),
            np.concatenate([self.stamps, other.stamps]),
        )

    def write(self, path: Path) -> None:
        """Write the table to a file. Raises OSError if it cannot be written."""
        kinds, list_of = np.unique(self.list_of, return_inverse=True)
        lists = [self.lists[kind] for kind in kinds]
        texts = {"names": self.names, "lists": lists}
        arrays = {name: np.frombuffer(json.dumps(text).encode(), np.uint8) for name, text in texts.items()}
        arrays |= {"list_of": list_of.astype(np.int32), "first": self.first}
        write_arrays(path, arrays | {"turns": self.turns, "stamps": self.stamps})

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read the table from a file; an empty one where it is missing or damaged."""
        try:
            names, lists, *arrays = read_arrays(path, *cls._fields)
            return cls(json.loads(names.tobytes()), json.loads(lists.tobytes()), *arrays)
        except (FileNotFoundError, DamagedFileError):
            return cls.of([])


class Turns:
    """The quarter turns of each picture of each shape: `turns[shape]` is a list of them.

    Args:
        turns: (P,) uint8 of all pictures.
        first: (n + 1,) int64, the number of each shape's first picture.
    """

    def __init__(self, turns: np.ndarray, first: np.ndarray):
        self.turns, self.first = turns, first

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, shape: int) -> list[int]:
        return self.turns[self.first[shape] : self.first[shape + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[shape] for shape in range(len(self)))

    def symmetries(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Whether the pictures of shapes [start, stop) show each symmetry, flipped ones included: (number, 8) bool."""
        first = self.first[start : len(self) + 1 if stop is None else stop + 1]
        seen = np.zeros((len(first) - 1, NUM_SYMMETRIES), dtype=bool)
        seen[np.arange(len(seen)).repeat(np.diff(first)), self.turns[first[0] : first[-1]]] = True
        seen[:, MIRROR:] = seen[:, :MIRROR]
        return seen


class PictureFiles:
    """The picture files of each shape: `files[shape]` is a list of paths."""

    def __init__(self, folder: Path, table: Table):
        self.folder, self.names, self.lists, self.list_of = folder, table.names, table.lists, table.list_of

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, shape: int) -> list[Path]:
        return [self.folder / self.names[shape] / file for file in self.lists[self.list_of[shape]]]

    def __iter__(self) -> Iterator[list[Path]]:
        return (self[shape] for shape in range(len(self)))


class Cameras(NamedTuple):
    """The pictures of n shapes, as datasets use them."""

    names: list[str]
    files: PictureFiles
    turns: Turns
    first: np.ndarray  # (n + 1,) int64


def read_cameras(data_dir: str | Path, names: list[str], turn_to_camera: bool) -> Cameras:
    """List the pictures of those of the named shapes that have some.

    Args:
        turn_to_camera: whether shapes are turned until the camera is in front; else all turns are 0.

    Raises:
        TooManyDamagedError: too many of the files that list a shape's pictures are damaged.
    """
    folder, table = open_data(data_dir), read_table(data_dir, names)
    if table.names:
        load_entries(folder / "views")
    turns = Turns(table.turns if turn_to_camera else np.zeros_like(table.turns), table.first)
    return Cameras(table.names, PictureFiles(folder / "views", table), turns, table.first)


def read_table(data_dir: str | Path, names: list[str]) -> Table:
    """Read the rows of those of the named shapes that have pictures. Raises as `read_cameras`."""
    folder = open_data(data_dir)
    table = Table.read(folder / TABLE)
    if not isinstance(folder, PackedPath):  # packed files do not change
        table = _brought_up_to_date(table, folder, names)
    row_of = {name: row for row, name in enumerate(table.names)}
    rows = np.array([row_of.get(name, -1) for name in names], dtype=np.int64)
    table = table.select(rows[rows >= 0])
    return table.select(np.flatnonzero(np.diff(table.first)))


def _brought_up_to_date(table: Table, folder: Path, names: list[str]) -> Table:
    """Read the files of these shapes that are not in the table as they are now; forget those that are gone."""
    files = [f"{folder}/views/{name}/cameras.json" for name in names]  # not Paths, which are slow to make
    with ThreadPoolExecutor(THREADS) as pool:
        parts = [files[i : i + READ_AT_ONCE] for i in range(0, len(files), READ_AT_ONCE)]
        stamps = np.concatenate([np.array(part).reshape(-1, 2) for part in pool.map(_stamps, parts)])
        row_of = {name: row for row, name in enumerate(table.names)}
        rows = np.array([row_of.get(name, -1) for name in names], dtype=np.int64)
        is_known = rows >= 0
        is_known[is_known] = (table.stamps[rows[is_known]] == stamps[is_known]).all(1)
        wanted = np.flatnonzero(~is_known & (stamps[:, 0] >= 0)).tolist()
        parts = [[files[i] for i in wanted[j : j + READ_AT_ONCE]] for j in range(0, len(wanted), READ_AT_ONCE)]
        found = [read for part in pool.map(_read_all, parts) for read in part]
    damaged, new = DamagedFiles(len(names), "render_views"), []
    for place, read in zip(wanted, found, strict=True):
        if isinstance(read, DamagedFileError):
            damaged.add(place, read)
        else:
            new.append((names[place], *read, tuple(stamps[place].tolist())))
    if not (new or (is_known != (rows >= 0)).any()):
        return table
    kept = np.ones(len(table.names), dtype=bool)
    kept[rows[rows >= 0]] = is_known[rows >= 0]
    table = table.select(np.flatnonzero(kept)).extended(Table.of(new))
    if len(table.names) >= MANY:
        with contextlib.suppress(OSError):  # a folder that cannot be written to: the next start reads them again
            table.write(folder / TABLE)
    return table


def _stamps(files: list[str]) -> list[tuple[int, int]]:
    """Size and time of each file; -1 for one that is not there."""
    stamps = []
    for file in files:
        try:
            stat = os.stat(file)
            stamps.append((stat.st_size, stat.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            stamps.append((-1, -1))
    return stamps


def _read_all(files: list[str]) -> list[tuple[list[str], list[int]] | DamagedFileError]:
    """Read cameras.json files: the names of the pictures and their turns, or the error of a damaged file."""
    found: list[tuple[list[str], list[int]] | DamagedFileError] = []
    for file in files:
        try:
            views = json.loads(Path(file).read_bytes())["views"]
            pairs = [(str(view["file"]), facing(float(view["camera"]["azimuth"]))[0]) for view in views]
            found.append(([name for name, _ in pairs], [turns for _, turns in pairs]))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            found.append(DamagedFileError(f"damaged file {file} ({error})"))
    return found
