"""A folder of pictures -> a folder of meshes: which files are pictures, what each mesh is called, what goes wrong.

A picture that cannot be used is named and skipped. A mesh that is already there is kept, so a run that was stopped
goes on where it was: meshes are written whole or not at all.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .generation_error import GenerationError
from .images.image_file import ImageError
from .meshes.mesh_file import MeshFileError
from .storage.one_line import one_line

HEIC = (".heic", ".heif")  # read where pillow-heif is installed; the error says so where it is not


@dataclass
class Counts:
    """How many meshes of a folder were made, kept because they were there, or not made."""

    made: int = 0
    kept: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.made} made, {self.kept} already there, {self.failed} failed"


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder in the order of their names, without those of folders in it.

    Raises:
        ImageError: the folder cannot be read, or has no picture.
    """
    Image.init()
    kinds = {*HEIC, *(kind for kind, format in Image.registered_extensions().items() if format in Image.OPEN)}
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"cannot read {folder}: {error.strerror}") from None
    pictures = [f for f in files if f.suffix.lower() in kinds and not f.name.startswith(".") and f.is_file()]
    if not pictures:
        raise ImageError(f"expected pictures such as .png or .jpg in {folder}, got none")
    return pictures


def name_meshes(pictures: list[Path], output: Path, kind: str) -> dict[Path, Path]:
    """Return the file of each picture's mesh: chair.png -> chair.glb, and chair.png.glb if there is a chair.jpg too.

    Args:
        output: the folder of the meshes.
        kind: their extension, with its dot.
    """
    stems = Counter(picture.stem.casefold() for picture in pictures)  # file systems may take a and A for one name
    return {p: output / ((p.stem if stems[p.stem.casefold()] == 1 else p.name) + kind) for p in pictures}


def make_output_folder(output: Path) -> None:
    """Make the folder of the meshes unless it is there. Raises MeshFileError if it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeshFileError(f"cannot make the folder {output}: {error.strerror}") from None


def make_meshes(files: dict[Path, Path], make: Callable[[Path, Path], None], again: bool = False) -> Counts:
    """Call make(picture, mesh file) for each pair, and report on standard error what came of it.

    Args:
        files: mesh files by their pictures.
        make: raises ImageError or GenerationError for a picture that cannot be used; all other errors end the run.
        again: make also meshes that are there already.
    """
    counts = Counts()
    for number, (picture, mesh_file) in enumerate(files.items(), 1):
        print(f"[{number}/{len(files)}] {picture.name}", file=sys.stderr)
        if mesh_file.exists() and not again:
            print(f"{mesh_file}: already there", file=sys.stderr)
            counts.kept += 1
            continue
        try:
            make(picture, mesh_file)
            counts.made += 1
        except (ImageError, GenerationError) as error:
            line = one_line(error)
            print(f"error: {line if str(picture) in line else f'{picture}: {line}'}", file=sys.stderr)
            counts.failed += 1
    return counts
