"""Files of named arrays (safetensors) with a checksum of each array. Imports no torch.

The metadata of a file has the checksums, which arrays are compressed, and what its maker says about it. A compressed
array is stored as the bytes of a zlib stream; its checksum is that of the array itself. Older files have neither
checksums nor compressed arrays; they are read all the same.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from d3ds2.storage.atomic_file import replacing
from d3ds2.storage.one_line import one_line

ABOUT = "about"  # the key of a file's metadata
LEVEL = 1  # of zlib: higher ones make SDFs 5 to 13 % smaller, and take up to twice the time
MOST_EXPANSION = 1100  # of zlib is 1032; a damaged header may ask for any size
DTYPES = {"F16": "f2", "F32": "f4", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
DTYPES |= {"U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "BOOL": "?"}


class DamagedFileError(ValueError):
    """A file of training data that is not as it was written. The message is one line and names the file."""


def write_arrays(
    path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any] | None = None, compressed: tuple[str, ...] = ()
) -> str:
    """Write named arrays of any shapes, their checksums, and what `about` says to a file, whole or not at all.

    Args:
        compressed: the names of the arrays to compress.

    Returns:
        The file's checksum, which compression does not change.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    written = (about or {}) | {"checksums": checksums}
    if compressed:
        written["compressed"] = {name: [arrays[name].dtype.str[1:], arrays[name].shape] for name in compressed}
        arrays |= {name: _compress(arrays[name]) for name in compressed}
    # under one key, as safetensors writes keys in a random order
    content = save(arrays, {ABOUT: json.dumps(written)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)  # not by safetensors, whose errors do not say that the disk is full
    return checksum_of_file(checksums)


def read_arrays(path: Path, *names: str, first: int | None = None) -> list[np.ndarray]:
    """Read the named arrays of a file, in the order of the names.

    Args:
        first: the bytes to read before the header says how many more are needed; None: read the whole file at once.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: a ValueError; the file is cut off, or differs from its checksums.
    """
    try:
        with path.open("rb") as file:
            content = file.read() if first is None else file.read(first)
            header = parse_header(content)
            end = max(header.places[name].stop for name in names)
            if end > len(content) and first is not None:
                content += file.read(end - len(content))
            if file.seek(0, 2) != header.size:
                raise ValueError("its size is not that of its arrays")
        arrays = [header.array(content, name) for name in names]
    except FileNotFoundError:
        raise FileNotFoundError(f"missing file {path}") from None
    except KeyError as error:
        raise DamagedFileError(f"damaged file {path} (it has no array {error})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"damaged file {path} ({one_line(error)})") from None
    for name, array in zip(names, arrays, strict=True):
        if header.checksums.get(name, _checksum(array)) != _checksum(array):
            raise DamagedFileError(f"damaged file {path} ({name} differs from its checksum)")
    return arrays


def names_in(path: Path) -> list[str]:
    """List the arrays of a file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not such a file, or is cut off.
    """
    try:
        return list(read_header(path).arrays)
    except FileNotFoundError:
        raise FileNotFoundError(f"missing file {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"damaged file {path} ({one_line(error)})") from None


class Header(NamedTuple):
    """The beginning of a file, which describes its arrays."""

    about: dict[str, Any]  # as `write_arrays` took it; empty in older files
    checksums: dict[str, str]  # by array; empty in older files
    stored: dict[str, tuple[str, list[int]]]  # dtype and shape of each array in the file
    arrays: dict[str, tuple[str, list[int]]]  # the same of the array itself, which may be compressed in the file
    places: dict[str, slice]  # the bytes of each array
    size: int  # of the file

    def array(self, content: bytes, name: str) -> np.ndarray:
        """Return an array of any shape of a file with this content, which may lack what comes after the array.

        Raises:
            ValueError: the content ends before the array does, or cannot be decompressed.
        """
        dtype, shape = self.arrays[name]
        stored: Any = memoryview(content)[self.places[name]]
        if len(stored) != self.places[name].stop - self.places[name].start:
            raise ValueError("it is cut off")
        if self.stored[name] != self.arrays[name]:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            try:
                stored = zlib.decompress(stored, bufsize=max(1, min(size, MOST_EXPANSION * len(stored))))
            except zlib.error:
                raise ValueError(f"{name} differs from its checksum") from None
        return np.frombuffer(stored, dtype).reshape(shape).copy()  # may be written to, and does not hold `content`


def parse_header(content: bytes) -> Header:
    """Read the header of a file from its first bytes.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not the header of such a file, or is cut off.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 + length or length == 0:
        raise ValueError("its header is cut off")
    entries = json.loads(content[8 : 8 + length])
    about = json.loads(entries.pop("__metadata__", {}).get(ABOUT, "{}"))
    stored = {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in entries.items()}
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    places = {name: slice(8 + length + start, 8 + length + stop) for name, (start, stop) in offsets.items()}
    arrays = stored | {name: (dtype, shape) for name, (dtype, shape) in about.pop("compressed", {}).items()}
    size = max((place.stop for place in places.values()), default=8 + length)
    return Header(about, about.pop("checksums", {}), stored, arrays, places, size)


def read_header(path: Path) -> Header:
    """Read the header of a file alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its size is not that of its arrays, or as `parse_header`, whose other errors it raises too.
    """
    with path.open("rb") as file:
        start = file.read(4096)
        length = int.from_bytes(start[:8], "little")
        size = file.seek(0, 2)
        if 4096 < 8 + length <= size:
            file.seek(0)
            start = file.read(8 + length)
    header = parse_header(start)
    if header.size != size:
        raise ValueError("its size is not that of its arrays")
    return header


def _compress(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(zlib.compress(array.reshape(-1).view(np.uint8).data, LEVEL), np.uint8)


def _checksum(array: np.ndarray) -> str:
    start = zlib.crc32(f"{array.dtype}{array.shape}".encode())
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data, start):08x}"  # read without a copy


def checksum_of_file(checksums: dict[str, str]) -> str:
    """Return one checksum for those of all arrays; "" for the files of older versions, which have none."""
    return f"{zlib.crc32(json.dumps(checksums, sort_keys=True).encode()):08x}" if checksums else ""
