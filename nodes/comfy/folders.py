"""ComfyUI's folders: where models are found, and where the pictures of the shipped workflows go.

Models lie in `models/direct3d_s2/<name>`, or under the paths that extra_model_paths.yaml lists; `tiny` comes with the
pack. A model folder holds config.json and one .safetensors file per network; see d3ds2/storage/model_folder.py.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import folder_paths

from .errors import without_tags

ROOT = Path(__file__).parents[2]
FOLDER = "direct3d_s2"
TINY = "tiny"
PICTURE_PREFIX = "d3ds2_"
PLACED = "d3ds2_example_pictures.txt"


def register_model_folder() -> None:
    """Add `models/direct3d_s2` to ComfyUI's model paths, after those from extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")  # the files that the front end lists


def model_names() -> list[str]:
    """Return `tiny` and the folders with a config.json below the model paths, such as `paper` or `mine/chairs`."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in ("*/config.json", "*/*/config.json"):
            found |= {config.parent.relative_to(root).as_posix() for config in root.glob(pattern)}
    return [TINY, *sorted(found - {TINY})]


def model_folder(name: str) -> Path:
    """Return the folder of a model. Raises ValueError, with advice, if no folder has that name."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
    for root in roots:
        with suppress(OSError):  # a name that is too long, or a folder without permission
            if inside and (root / name / "config.json").is_file():
                return root / name
    if name == TINY:
        return ROOT / "d3ds2" / "weights" / TINY
    raise ValueError(
        without_tags(
            f"no model folder {name!r}: expected {roots[0] / name} with config.json and its .safetensors files. "
            f"Put the folder there and press R in ComfyUI, or choose one of {', '.join(model_names())}."
        )
    )


def place_example_pictures() -> None:
    """Copy workflows/*.png, the pictures that the workflows load, into ComfyUI's input folder, each once.

    Existing files stay, and a picture that the user has deleted does not come back: a list in ComfyUI's user folder
    says which were placed. If a folder cannot be written, the workflows ask for a picture.
    """
    folder, placed = Path(folder_paths.get_input_directory()), Path(folder_paths.get_user_directory()) / PLACED
    with suppress(OSError):
        before = placed.read_text(encoding="utf-8").splitlines() if placed.is_file() else []
        folder.mkdir(parents=True, exist_ok=True)
        pictures = sorted((ROOT / "workflows").glob("*.png"))
        new = [picture for picture in pictures if PICTURE_PREFIX + picture.name not in before]
        for picture in new:
            target = folder / (PICTURE_PREFIX + picture.name)
            if not target.exists():
                shutil.copyfile(picture, target)
        if new:
            placed.parent.mkdir(parents=True, exist_ok=True)
            placed.write_text("\n".join([*before, *(PICTURE_PREFIX + p.name for p in new)]) + "\n", encoding="utf-8")
