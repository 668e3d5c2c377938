"""The files between the stages of training, all in one folder `data_dir`. Imports no torch.

    index.json                                  [{name, source, split, num_tokens: {"256": 2034}}, ...]
    shapes/<R>/<name>.safetensors               prepare_shapes:  block_coords (M,3), sdf (M,8,8,8), sharp (M,64) bits
    views/<name>/000.png ... cameras.json       render_views:    RGBA
    latents/<R>/<name>@<symmetry>.safetensors   encode_latents:  coords (M,3), mean (M,C), logvar (M,C)

Sizes: M blocks of 8³ SDF voxels, which are the tokens of a shape; C latent channels; R voxels per edge.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from d3ds2.meshes.mesh_to_sdf import SparseSDF
from d3ds2.storage.atomic_file import replacing
from training.data.symmetry import transform_grid, transform_voxels

BLOCK = 8  # voxels along the edge of a stored block; that of d3ds2.geometry.voxels, which would import torch


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


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays to a safetensors file, whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Read the named arrays of a safetensors file, in the order of the names."""
    with safe_open(path, "numpy") as file:
        return [file.get_tensor(name) for name in names]


def save_shape(path: Path, shape: SparseSDF) -> None:
    """Write an SDF in half precision; active voxels (|sdf| < 1) stay active."""
    below_one = np.nextafter(np.float16(1), np.float16(0))  # rounding must not bring an active voxel to 1
    sdf = np.where(shape.active, shape.values.clip(-below_one, below_one), shape.values)
    arrays = {
        "block_coords": shape.block_coords.astype(np.int16),
        "sdf": sdf.astype(np.float16),
        "sharp": np.packbits(shape.sharp.reshape(-1, BLOCK**3), axis=1),
    }
    write_arrays(path, arrays)


def load_shape(path: Path, symmetry: int = 0) -> StoredShape:
    """Read a shape file, moved by a symmetry; the blocks are in lexicographic order again."""
    blocks, sdf, sharp = read_arrays(path, "block_coords", "sdf", "sharp")
    sharp = np.unpackbits(sharp, axis=1).view(bool).reshape(sdf.shape)
    if symmetry:
        blocks, order = move_blocks(blocks, int(path.parent.name) // BLOCK, symmetry)
        sdf, sharp = transform_grid(sdf, symmetry)[order], transform_grid(sharp, symmetry)[order]
    return StoredShape(blocks, sdf, sharp)


def move_blocks(blocks: np.ndarray, edge: int, symmetry: int) -> tuple[np.ndarray, np.ndarray]:
    """Move block coordinates (M,3) in a grid of `edge` and sort them.

    Returns:
        The coordinates (M,3) in lexicographic order, and the old row (M,) of each.
    """
    moved = transform_voxels(blocks, edge, symmetry)
    x, y, z = moved.T.astype(np.int64)
    order = ((x * edge + y) * edge + z).argsort()
    return moved[order], order


def list_shapes(data_dir: str | Path, split: str, resolution: int) -> tuple[list[str], np.ndarray]:
    """List the names of a split's n shapes, and their numbers of tokens (n,) int64 at `resolution`.

    Raises:
        FileNotFoundError: `data_dir` was not made by prepare_shapes.
        ValueError: it has no shape of this split at this resolution.
    """
    index = Path(data_dir) / "index.json"
    if not index.is_file():
        raise FileNotFoundError(f"expected {index}; make it with python -m training.prepare_shapes")
    records = [r for r in json.loads(index.read_text()) if r["split"] == split and str(resolution) in r["num_tokens"]]
    if not records:
        raise ValueError(f"expected shapes of split {split!r} at resolution {resolution} in {index}, got none")
    return [r["name"] for r in records], np.array([r["num_tokens"][str(resolution)] for r in records])
