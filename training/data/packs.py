"""Packed training data: the files of a `data_dir` in a few large ones, on disk or at a URL. Imports no torch.

A cluster's disk serves millions of small files badly, and an object store has no folders. So `training.pack` writes

    pack.json                      the folders that are packed, and the files that are not; written last
    index.json, latents/<R>/moments.json, views.safetensors     small files, as they were
    shapes/<R>/00000.tar ...       the files of a folder, one after the other, uncompressed
    shapes/<R>/entries.safetensors where each of them begins: key (n,) uint64, tar (n,) uint32, start (n,) uint64,
                                   length (n,) uint32, sorted by key

A reader holds the entries of the folders that it uses, 24 bytes for each file, and reads any file by one request for a
range of bytes. At a URL that is done by fsspec (https, s3, gs, ...). The key is a hash of the file's name.
"""

import fnmatch
import functools
import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from d3ds2.storage.one_line import one_line
from training.data.array_files import DamagedFileError, read_arrays

MANIFEST, FORMAT = "pack.json", 1
ENTRIES = "entries.safetensors"
COLUMNS = ("key", "tar", "start", "length")
WAITS = (0.2, 0.6, 2.0, 6.0, 20.0)  # seconds before a request that failed is repeated


def open_data(data_dir: str | Path) -> Path:
    """Return the folder of training data, or what reads like it where `data_dir` is packed or a URL.

    Raises:
        FileNotFoundError: there is no pack at the URL.
        ValueError: the pack is damaged, or of a format that cannot be read.
        OSError: the server does not answer.
    """
    if not isinstance(data_dir, str):
        return data_dir
    manifest = Path(data_dir) / MANIFEST
    if "://" in data_dir:
        pack = _open_pack(data_dir.rstrip("/"))
    elif manifest.is_file():
        pack = _open_pack(data_dir, manifest.stat().st_mtime_ns)
    else:
        return Path(data_dir)
    return cast(Path, PackedPath(pack))  # it has the methods of Path that readers use


def load_entries(folder: Path) -> None:
    """Read the entries of a folder if it is packed: before other processes are forked, which then share them.

    Raises:
        FileNotFoundError: the pack does not have this folder.
        DamagedFileError: the entries are damaged.
    """
    if isinstance(folder, PackedPath):
        if folder.inside not in folder.pack.folders:
            raise FileNotFoundError(f"expected {folder} among the packed folders: pack the data again")
        folder.pack.entries(folder.inside)


@functools.lru_cache(maxsize=16)
def _open_pack(place: str, _changed: int = 0) -> "Pack":
    return Pack(place)


def key_of(name: str) -> int:
    """The key of a file in the entries: a hash of its name in the `data_dir`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Place(NamedTuple):
    """Where the content of a packed file is."""

    file: str
    start: int
    stop: int | None  # None: where the file ends


class Pack:
    """The packed files in a folder or at a URL.

    Attributes:
        place: the folder or the URL.
        folders: the packed folders, such as "shapes/256".
        files: the names of the files that are not packed.

    Raises:
        FileNotFoundError: there is no pack.
        ValueError: its manifest is damaged, or of another format.
    """

    def __init__(self, place: str):
        self.place = place
        try:
            manifest = json.loads(read_bytes(f"{place}/{MANIFEST}"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {manifest['format']}")
            self.folders, self.files = tuple(manifest["folders"]), frozenset(manifest["files"])
        except FileNotFoundError:
            raise FileNotFoundError(f"expected {place}/{MANIFEST}; make it with python -m training.pack") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"damaged file {place}/{MANIFEST} ({one_line(error)})") from None
        self._entries: dict[str, list[np.ndarray]] = {}

    def entries(self, folder: str) -> list[np.ndarray]:
        """The COLUMNS of a folder's entries, each (n,). They are read when they are first asked for."""
        if folder not in self._entries:
            path = cast(Path, PackedPath(self, f"{folder}/{ENTRIES}"))
            self._entries[folder] = read_arrays(path, *COLUMNS)
        return self._entries[folder]

    def find(self, name: str) -> Place | None:
        """Return the place of a file; None if there is no such file."""
        folder = next((folder for folder in self.folders if name.startswith(folder + "/")), None)
        if folder is None or name == f"{folder}/{ENTRIES}":
            return Place(f"{self.place}/{name}", 0, None) if folder or name in self.files else None
        keys, tars, starts, lengths = self.entries(folder)
        key = np.uint64(key_of(name))
        row = int(np.searchsorted(keys, key))
        if row == len(keys) or keys[row] != key:
            return None
        start = int(starts[row])
        return Place(f"{self.place}/{folder}/{int(tars[row]):05d}.tar", start, start + int(lengths[row]))


class PackedPath:
    """A file or folder in a pack. It reads as a `Path` does; nothing can be written."""

    def __init__(self, pack: Pack, inside: str = ""):
        self.pack, self.inside = pack, inside

    def __truediv__(self, part: str) -> "PackedPath":
        return PackedPath(self.pack, f"{self.inside}/{part}" if self.inside else part)

    def __lt__(self, other: "PackedPath") -> bool:
        return self.inside < other.inside

    def __str__(self) -> str:
        return f"{self.pack.place}/{self.inside}" if self.inside else self.pack.place

    def __fspath__(self) -> str:
        raise ValueError(f"expected a folder that can be written to, got the packed files in {self.pack.place}")

    def mkdir(self, **_: Any) -> None:
        """Raise ValueError: a pack is not written to."""
        self.__fspath__()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.inside.rpartition("/")[2]

    @property
    def parent(self) -> "PackedPath":
        """The folder that this is in."""
        return PackedPath(self.pack, self.inside.rpartition("/")[0])

    @property
    def parents(self) -> list["PackedPath"]:
        """The folder that this is in, the folder that that one is in, and so on."""
        parts = self.inside.split("/")
        return [PackedPath(self.pack, "/".join(parts[:n])) for n in range(len(parts) - 1, -1, -1)]

    def with_name(self, name: str) -> "PackedPath":
        """The file of this name in the same folder."""
        return self.parent / name

    def is_file(self) -> bool:
        """Whether the pack has this file."""
        return self.pack.find(self.inside) is not None

    def glob(self, pattern: str) -> list["PackedPath"]:
        """Return the files that are not packed and whose path from here matches a pattern."""
        start = f"{self.inside}/" if self.inside else ""
        matching = [name for name in sorted(self.pack.files) if fnmatch.fnmatchcase(name, start + pattern)]
        return [PackedPath(self.pack, name) for name in matching if name.count("/") == (start + pattern).count("/")]

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading bytes.

        Raises:
            FileNotFoundError: the pack has no such file.
        """
        place = self.pack.find(self.inside)
        if mode != "rb":
            self.__fspath__()
        if place is None:
            raise FileNotFoundError(f"missing file {self}")
        if place.stop is None:
            return io.BytesIO(read_bytes(place.file))
        return cast(BinaryIO, _Part(self, place))

    def read_bytes(self) -> bytes:
        """Read the whole file. Raises as `open`."""
        with self.open() as file:
            return file.read()

    def read_text(self) -> str:
        """Read the whole file as UTF-8. Raises as `open`."""
        return self.read_bytes().decode()


class _Part:
    """Part of a large file, read as a file of its own."""

    def __init__(self, path: PackedPath, place: Place):
        self.path, self.place, self.size, self.at = path, place, (place.stop or 0) - place.start, 0

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_) -> None:
        pass

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, number: int = -1) -> bytes:
        stop = self.size if number < 0 else min(self.size, self.at + number)
        if stop <= self.at:
            return b""
        first, file = self.place.start, self.place.file
        content = read_bytes(file, first + self.at, first + stop)
        if len(content) > stop - self.at:
            raise OSError(f"expected a server that sends parts of files, but it sent all of {file}")
        if len(content) < stop - self.at:
            raise DamagedFileError(f"damaged file {self.path} ({file} is cut off)")
        self.at = stop
        return content


def read_bytes(file: str, start: int = 0, stop: int | None = None) -> bytes:
    """Read a range of bytes of a file on disk or at a URL. A request that fails is repeated for half a minute.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: fsspec is missing, or does not know this kind of URL.
        OSError: the disk or the server refuses it.
    """
    if "://" not in file:
        with open(file, "rb") as local:
            local.seek(start)
            return local.read() if stop is None else local.read(stop - start)
    try:
        import fsspec  # imported here: only a URL needs it
    except ImportError:
        raise ValueError(f"reading {file} needs fsspec: pip install 'fsspec[http]'") from None
    for wait in (*WAITS, None):
        try:
            # a file system is made again in each process, as connections do not outlive a fork
            system, path = fsspec.core.url_to_fs(file)
            return system.cat_file(path, start, stop)
        except (FileNotFoundError, ImportError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"missing file {file}") from None
            raise ValueError(f"cannot read {file} ({one_line(error)})") from None
        except Exception as error:  # each kind of server has errors of its own
            if wait is None:
                raise OSError(f"cannot read {file} ({one_line(error) or type(error).__name__})") from None
            time.sleep(wait)
    raise AssertionError("unreachable")
