"""The files between the stages of training, all in one folder `data_dir`. Imports no torch.

    index.json, index.<i>-of-<n>.json           records of all shapes, see `index_files`
    shapes/<R>/<name>.safetensors               prepare_shapes:  block_coords (M,3), sdf (M,8,8,8), sharp (M,64) bits
    views/<name>/000.png ... cameras.json       render_views:    RGBA
    views/<name>/000_points.png ...             render_views:    point maps, if they were asked for, see `point_maps`
    surfels/<name>.safetensors                  sample_surfels:  points, normals and colours, see `surfels`
    latents/<R>/<name>@<symmetry>.safetensors   encode_latents:  coords (M,3), mean (M,C), logvar (M,C)

The metadata of a file has a checksum of each array, and the settings that the file was made with (`array_files`).
Older files have neither; they are read all the same. A `data_dir` may also be the packed files of such a folder, on
disk or at a URL (`packs`).

Sizes: M blocks of 8³ SDF voxels, which are the tokens of a shape; C latent channels; R voxels per edge.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d3ds2.meshes.mesh_to_sdf import SparseSDF
from training.data.array_files import (
    DamagedFileError,
    checksum_of_file,
    read_arrays,
    read_header,
    write_arrays,
)
from training.data.index_files import read_index
from training.data.packs import open_data
from training.data.symmetry import transform_grid, transform_voxels

BLOCK = 8  # voxels along the edge of a stored block; that of d3ds2.geometry.voxels, which would import torch
STRUCTURE_BYTES = 1 << 18  # read at first for the blocks' coordinates alone: those of 40,000 blocks


class StoredShape(NamedTuple):
    """A prepared shape: the SDF of the blocks near its surface."""

    block_coords: np.ndarray  # (M, 3) int16 at R/8, in lexicographic order
    sdf: np.ndarray  # (M, 8, 8, 8) fp16 in [-1, 1], negative inside
    sharp: np.ndarray  # (M, 8, 8, 8) bool: near a sharp edge


def shape_path(data_dir: str | Path, resolution: int, name: str) -> Path:
    """The file of a prepared shape."""
    return open_data(data_dir) / "shapes" / str(resolution) / f"{name}.safetensors"


def latent_path(data_dir: str | Path, resolution: int, name: str, symmetry: int) -> Path:
    """The file of a moved shape's latents."""
    return open_data(data_dir) / "latents" / str(resolution) / f"{name}@{symmetry}.safetensors"


def view_folder(data_dir: str | Path, name: str) -> Path:
    """The folder of a shape's pictures and of cameras.json, which says how each was taken."""
    return open_data(data_dir) / "views" / name


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
        header = read_header(path)
        tokens = header.arrays[coords][1][0]
        if verify:
            read_arrays(path, *header.arrays)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return FileSummary(header.about, tokens, checksum_of_file(header.checksums))


def save_shape(path: Path, shape: SparseSDF, about: dict[str, Any] | None = None) -> str:
    """Write an SDF in half precision; return the file's checksum. Active voxels (|sdf| < 1) stay active."""
    below_one = np.nextafter(np.float16(1), np.float16(0))  # rounding must not bring an active voxel to 1
    sdf = np.where(shape.active, shape.values.clip(-below_one, below_one), shape.values)
    arrays = {
        "block_coords": shape.block_coords.astype(np.int16),
        "sdf": sdf.astype(np.float16),
        "sharp": np.packbits(shape.sharp.reshape(-1, BLOCK**3), axis=1),
    }
    return write_arrays(path, arrays, about, compressed=("sdf", "sharp"))


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


def read_structure(path: Path) -> np.ndarray:
    """Read the coordinates (M,3) of a shape's blocks alone. Raises as `read_arrays`."""
    (blocks,) = read_arrays(path, "block_coords", first=STRUCTURE_BYTES)
    if blocks.shape != (len(blocks), 3):
        raise DamagedFileError(f"damaged file {path} (blocks of shape {blocks.shape})")
    return blocks


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
        raise _no_shapes(data_dir, split, resolution)
    return records


def list_shapes(data_dir: str | Path, split: str, resolution: int) -> tuple[list[str], np.ndarray]:
    """List the names of a split's n shapes, and their numbers of tokens (n,) int64 at `resolution`.

    Raises as `list_records`.
    """
    return list_shapes_at(data_dir, split, (resolution,))[resolution]


def list_shapes_at(
    data_dir: str | Path, split: str, resolutions: tuple[int, ...]
) -> dict[int, tuple[list[str], np.ndarray]]:
    """Return for each resolution what `list_shapes` returns. Of half a million records it keeps 150 bytes each.

    Raises as `list_records`.
    """
    keys = [str(R) for R in resolutions]

    def keep(record: dict) -> tuple | None:
        if record["split"] != split:
            return None
        return record["name"], *(record["num_tokens"].get(key, 0) for key in keys)

    kept = read_index(data_dir, keep)
    if not kept:
        raise _no_shapes(data_dir, split, resolutions[0])
    (names, *columns), listed = zip(*kept, strict=True), {}
    for R, column in zip(resolutions, columns, strict=True):
        tokens = np.array(column)
        present = np.flatnonzero(tokens)
        if len(present) == 0:
            raise _no_shapes(data_dir, split, R)
        listed[R] = list(names) if len(present) == len(names) else [names[i] for i in present.tolist()], tokens[present]
    return listed


def _no_shapes(data_dir: str | Path, split: str, resolution: int) -> ValueError:
    return ValueError(f"expected shapes of split {split!r} at resolution {resolution} in {data_dir}, got none")


def shape_weights(data_dir: str | Path, names: list[str], by_source: dict[str, float]) -> np.ndarray:
    """Return the weight of each named shape (n,) float64: that of its source, 1 if `by_source` does not list it.

    Raises:
        ValueError: no shape of the folder has one of these sources.
    """
    source_of = dict(read_index(data_dir, lambda record: (record["name"], record["source"])))
    if unknown := by_source.keys() - source_of.values():
        raise ValueError(f"expected sources of {data_dir} in source_weights, got {sorted(unknown)}")
    return np.array([by_source.get(source_of[name], 1.0) for name in names])
