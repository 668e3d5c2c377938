"""A folder of meshes -> a trained model, in three commands.

    python docs/examples/train_on_a_folder.py my_meshes models/mine

The configs are those of `tiny`. `key=value` changes a setting of training, such as run.steps=2; `configs=PREFIX` takes
other config files: PREFIX_shapes.toml, PREFIX_views.toml, PREFIX_vae.toml, ... If it was stopped, the same command
continues.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def main(meshes: str, model: str, *settings: str) -> None:
    meshes, model = Path(meshes).resolve(), Path(model).resolve()
    configs = next((s.removeprefix("configs=") for s in settings if s.startswith("configs=")), "training/configs/tiny")
    settings = [setting for setting in settings if not setting.startswith("configs=")]
    data = f"data_dir={model.parent / (model.name + '_data')}"
    run("training.prepare_shapes", f"{configs}_shapes.toml", f"meshes={meshes}", data)  # signed distances
    run("training.render_views", f"{configs}_views.toml", f"meshes={meshes}", data)  # pictures
    run("training", configs, data, f"model_dir={model}", *settings)  # the five stages
    print(f"trained: python -m d3ds2 picture.png -o mesh.glb --model {model}")


if __name__ == "__main__":
    main(*sys.argv[1:])
