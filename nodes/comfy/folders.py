"""Where model folders lie: `models/direct3d_s2/<name>`, and where extra_model_paths.yaml says; `tiny` is shipped.

A model folder holds config.json and one .safetensors file for each network; see d3ds2/checkpoint.py.
"""

import os
from pathlib import Path

import folder_paths

FOLDER = "direct3d_s2"
TINY = "tiny"


def register_model_folder() -> None:
    """Tell ComfyUI of `models/direct3d_s2`; paths that extra_model_paths.yaml gave before stay, and stay first."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")  # what the front end lists as its models


def model_names() -> list[str]:
    """`tiny`, and every folder with a config.json below the model paths, such as `paper` or `mine/chairs`."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in ("*/config.json", "*/*/config.json"):
            found |= {config.parent.relative_to(root).as_posix() for config in root.glob(pattern)}
    return [TINY, *sorted(found - {TINY})]


def model_folder(name: str) -> Path:
    """The folder of a model. Raises ValueError with what to do when there is none of that name."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
    for root in roots:
        if inside and (root / name / "config.json").is_file():
            return root / name
    if name == TINY:
        return Path(__file__).parents[2] / "d3ds2" / "weights" / TINY
    raise ValueError(
        f"no model folder {name!r}: expected {roots[0] / name} with config.json and its .safetensors files. "
        f"Put the folder there and press R in ComfyUI, or choose one of {', '.join(model_names())}."
    )
