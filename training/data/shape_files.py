"""The files between the stages of training, all in one folder `data_dir`. Imports no torch.

    index.json, index.<i>-of-<n>.json           records of all shapes, see `index_files`
    shapes/<R>/<name>.safetensors               prepare_shapes:  block_coords (M,3), sdf (M,8,8,8), sharp (M,64) bits
    views/<name>/000.png ... cameras.json       render_views:    RGBA
    latents/<R>/<name>@<symmetry>.safetensors   encode_latents:  coords (M,3), mean (M,C), logvar (M,C)

The metadata of a file has a checksum of each array, and the settings that the file was made with. Older files have
neither; they are read all the same.

Sizes: M blocks of 8³ SDF voxels, which are the tokens of a shape; C latent channels; R voxels per edge.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from d3ds2.meshes.mesh_to_sdf import SparseSDF
from d3ds2.storage.atomic_file import replacing
from d3ds2.storage.one_line import one_line
from training.data.index_files import read_index
from training.data.symmetry import transform_grid, transform_voxels

BLOCK = 8  # voxels along the edge of a stored block; that of d3ds2.geometry.voxels, which would import torch

ABOUT = "about"  # the key of a file's metadata


class StoredShape(NamedTuple):
    """A prepared shape: the SDF of the blocks near its surface."""

    block_coords: np.ndarray  # (M, 3) int16 at R/8, in lexicographic order
    sdf: np.ndarray  # (M, 8, 8, 8) fp16 in [-1, 1], negative inside
    sharp: np.ndarray  # (M, 8, 8, 8) bool: near a sharp edge


def shape_path(data_dir: str | Path, resolution: int, name: str) -> Path:
    """The file of a prepared shape."""
    return Path(data_dir) / "shapes" / str(resolution) / f"{name}.safetensors"


def latent_path(data_dir: str | Path, resolution: int, name: str, symmetry: int) -> Path:
    """The file of a moved shape's latents."""
    return Path(data_dir) / "latents" / str(resolution) / f"{name}@{symmetry}.safetensors"


def view_folder(data_dir: str | Path, name: str) -> Path:
    """The folder of a shape's pictures and of cameras.json, which says how each was taken."""
    return Path(data_dir) / "views" / name


class DamagedFileError(ValueError):
    """A file of training data that is not as it was written. The message is one line and names the file."""


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any] | None = None) -> str:
    """Write named arrays, their checksums, and what `about` says to a safetensors file, whole or not at all.

    Returns:
        The file's checksum.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    # under one key, as safetensors writes keys in a random order
    content = save(arrays, {ABOUT: json.dumps((about or {}) | {"checksums": checksums})})
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)  # not by safetensors, whose errors do not say that the disk is full
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    return _checksum_of_file(checksums)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Read the named arrays of a safetensors file, in the order of the names.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is cut off, or differs from its checksums.
    """
    try:
        with safe_open(path, "numpy") as file:
            checksums = _about(file).get("checksums", {})
            arrays = [file.get_tensor(name) for name in names]
    except FileNotFoundError:
        raise FileNotFoundError(f"missing file {path}") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise DamagedFileError(f"damaged file {path} ({one_line(error)})") from None
    for name, array in zip(names, arrays, strict=True):
        if name in checksums and checksums[name] != _checksum(array):
            raise DamagedFileError(f"damaged file {path} ({name} differs from its checksum)")
    return arrays


class FileSummary(NamedTuple):
    """The contents of a file's header, without its arrays."""

    about: dict[str, Any]  # as `write_arrays` took it; empty in older files
    tokens: int  # rows of the first array, which has the coordinates
    checksum: str  # of the whole file; "" in older files


def read_summary(path: Path, coords: str, verify: bool = False) -> FileSummary | None:
    """Read the header of a file whose array `coords` has one row per token; None if it is missing or damaged.

    `verify` reads all arrays too, and compares them with their checksums.
    """
    try:
        with safe_open(path, "numpy") as file:
            about, names = _about(file), list(file.keys())
            tokens = file.get_slice(coords).get_shape()[0]
        if verify:
            read_arrays(path, *names)
    except (FileNotFoundError, SafetensorError, ValueError, TypeError, IndexError):
        return None
    return FileSummary(about, tokens, _checksum_of_file(about.get("checksums", {})))


def _about(file) -> dict[str, Any]:
    """Return what `write_arrays` was given about an open file."""
    return json.loads((file.metadata() or {}).get(ABOUT, "{}"))


def _checksum(array: np.ndarray) -> str:
    start = zlib.crc32(f"{array.dtype}{array.shape}".encode())
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data, start):08x}"  # read without a copy


def _checksum_of_file(checksums: dict[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(checksums, sort_keys=True).encode()):08x}" if checksums else ""


def save_shape(path: Path, shape: SparseSDF, about: dict[str, Any] | None = None) -> str:
    """Write an SDF in half precision; return the file's checksum. Active voxels (|sdf| < 1) stay active."""
    below_one = np.nextafter(np.float16(1), np.float16(0))  # rounding must not bring an active voxel to 1
    sdf = np.where(shape.active, shape.values.clip(-below_one, below_one), shape.values)
    arrays = {
        "block_coords": shape.block_coords.astype(np.int16),
        "sdf": sdf.astype(np.float16),
        "sharp": np.packbits(shape.sharp.reshape(-1, BLOCK**3), axis=1),
    }
    return write_arrays(path, arrays, about)


def load_shape(path: Path, symmetry: int = 0) -> StoredShape:
    """Read a shape file, moved by a symmetry; the blocks are in lexicographic order again.

    Raises as `read_arrays`.
    """
    blocks, sdf, sharp = read_arrays(path, "block_coords", "sdf", "sharp")
    M = len(blocks)
    if blocks.shape != (M, 3) or sdf.shape != (M, BLOCK, BLOCK, BLOCK) or sharp.shape != (M, BLOCK**3 // 8):
        raise DamagedFileError(f"damaged file {path} (shapes {blocks.shape}, {sdf.shape} and {sharp.shape})")
    sharp = np.unpackbits(sharp, axis=1).view(bool).reshape(sdf.shape)
    if symmetry:
        blocks, order = move_blocks(blocks, int(path.parent.name) // BLOCK, symmetry)
        sdf, sharp = transform_grid(sdf, symmetry)[order], transform_grid(sharp, symmetry)[order]
    return StoredShape(blocks, sdf, sharp)


def read_latents(path: Path) -> list[np.ndarray]:
    """Read coords (M,3), mean (M,C) and logvar (M,C) of a shape's latents. Raises as `read_arrays`."""
    coords, mean, logvar = read_arrays(path, "coords", "mean", "logvar")
    if coords.shape != (len(coords), 3) or mean.shape != logvar.shape or len(mean) != len(coords):
        raise DamagedFileError(f"damaged file {path} (shapes {coords.shape}, {mean.shape} and {logvar.shape})")
    return [coords, mean, logvar]


def move_blocks(blocks: np.ndarray, edge: int, symmetry: int) -> tuple[np.ndarray, np.ndarray]:
    """Move block coordinates (M,3) in a grid of `edge` and sort them.

    Returns:
        The coordinates (M,3) in lexicographic order, and the old row (M,) of each.
    """
    moved = transform_voxels(blocks, edge, symmetry)
    x, y, z = moved.T.astype(np.int64)
    order = ((x * edge + y) * edge + z).argsort()
    return moved[order], order


def list_records(data_dir: str | Path, split: str, resolution: int) -> list[dict]:
    """Return the records of a split's shapes that exist at `resolution`, sorted by name.

    Raises:
        FileNotFoundError: `data_dir` was not made by prepare_shapes.
        ValueError: it has no shape of this split at this resolution, or its index is damaged.
    """
    records = [r for r in read_index(data_dir) if r["split"] == split and str(resolution) in r["num_tokens"]]
    if not records:
        raise ValueError(f"expected shapes of split {split!r} at resolution {resolution} in {data_dir}, got none")
    return records


def list_shapes(data_dir: str | Path, split: str, resolution: int) -> tuple[list[str], np.ndarray]:
    """List the names of a split's n shapes, and their numbers of tokens (n,) int64 at `resolution`.

    Raises as `list_records`.
    """
    records = list_records(data_dir, split, resolution)
    return [r["name"] for r in records], np.array([r["num_tokens"][str(resolution)] for r in records])


def shape_weights(data_dir: str | Path, names: list[str], by_source: dict[str, float]) -> np.ndarray:
    """Return the weight of each named shape (n,) float64: that of its source, 1 if `by_source` does not list it.

    Raises:
        ValueError: no shape of the folder has one of these sources.
    """
    source_of = {record["name"]: record["source"] for record in read_index(data_dir)}
    if unknown := by_source.keys() - source_of.values():
        raise ValueError(f"expected sources of {data_dir} in source_weights, got {sorted(unknown)}")
    return np.array([by_source.get(source_of[name], 1.0) for name in names])
