"""The samples of a batch: their seeds, pictures, structures and errors."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .pictures import to_pictures
from .sockets import MAX_SEED, Model, Structure

if TYPE_CHECKING:
    import torch
    from comfy_api.latest import Types
    from PIL import Image

    from ...d3ds2.geometry.voxels import Voxels
    from ...d3ds2.meshes.placement import Placement


def seed_of(seed: int, index: int) -> int:
    """Return the seed of sample `index` of a batch. The sample alone, with this seed, comes out the same."""
    return (seed + index) & MAX_SEED


@contextmanager
def sample(index: int, count: int) -> Generator[None]:
    """Make errors say which of several samples they are about.

    Raises ValueError for a ValueError in the block, with the number of the sample in front if there are several.
    """
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise ValueError(f"sample {index + 1} of {count}: {error}") from error


def object_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Return the objects in an IMAGE (B, H, W, 3 or 4), cut out by alpha or from a plain background: RGBA pictures.

    Raises ValueError, with advice, if neither shows an object.
    """
    from ...d3ds2.images.foreground import alpha_range, cut_out
    from ...d3ds2.images.image_file import ImageError

    pictures = to_pictures(images)
    cut_outs = []
    for index, picture in enumerate(pictures):
        transparent = picture.mode == "RGBA" and alpha_range(picture)[0] < 255
        with sample(index, len(pictures)):
            try:
                cut_outs.append(cut_out(picture, method="alpha") if transparent else cut_out(picture, method="plain"))
            except ImageError as error:
                raise ValueError(f"{error}. Put the node Remove Background before this one.") from None
    return cut_outs


def pack_structure(parts: list[Voxels], places: Sequence[Placement] = ()) -> Structure:
    """Return the voxels of single samples as one structure on the CPU, with the places of the meshes they are of."""
    from ...d3ds2.geometry.voxels import Voxels

    voxels = Voxels.cat([part.to("cpu") for part in parts])
    return Structure(voxels.coords, voxels.resolution, voxels.batch_size, tuple(places))


def voxel_grid(structure: Structure) -> Types.VOXEL:
    """Return core's VOXEL: (B, R, R, R) float32, 0 or 1, indexed [sample, z, y, x] as core's own nodes read it."""
    import torch
    from comfy_api.latest import Types

    grid = torch.zeros(structure.batch_size, *[structure.resolution] * 3)
    batch, x, y, z = structure.coords.long().unbind(1)
    grid[batch, z, y, x] = 1.0
    return Types.VOXEL(grid)


def token_text(structure: Structure) -> str:
    """Return a text such as "2,134 tokens at 32³", or "2,134 + 980 tokens at 32³" for a batch."""
    counts = structure.coords[:, 0].bincount(minlength=structure.batch_size).tolist()
    return f"{' + '.join(f'{count:,}' for count in counts)} tokens at {structure.resolution}³"


def structure_results(structure: Structure) -> tuple[Structure, Types.VOXEL, str, int]:
    """Return the values of `structure_outputs`."""
    counts = structure.coords[:, 0].bincount(minlength=structure.batch_size)
    return structure, voxel_grid(structure), token_text(structure), int(counts.max())


def check_structure(model: Model, structure: Structure) -> None:
    """Raise ValueError if none of the model's stages has the structure's resolution."""
    if structure.resolution not in model.stages:
        resolutions = " and ".join(f"{resolution}³" for resolution in model.stages)
        raise ValueError(
            f"wrong structure for this model: it is {structure.resolution}³, but the model {model.name!r} samples at "
            f"{resolutions}. Make the structure with the same model."
        )
