"""The pictures that the shipped workflows open with, put where Load Image finds them."""

import shutil
from contextlib import suppress
from pathlib import Path

import folder_paths

SHIPPED = Path(__file__).parents[2] / "workflows"
PREFIX = "d3ds2_"


def place_example_pictures() -> None:
    """Copy workflows/*.png into ComfyUI's input folder, unless a file of that name is there.

    An input folder that cannot be written stays as it is: the workflows then ask for a picture.
    """
    folder = Path(folder_paths.get_input_directory())
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in SHIPPED.glob("*.png"):
            target = folder / (PREFIX + picture.name)
            if not target.exists():
                shutil.copyfile(picture, target)
