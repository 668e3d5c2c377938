"""Fine-tune the structure DiT and the latent DiT of a model on a folder of meshes, by one command.

    python -m training.finetune training/configs/finetune.toml meshes=MESHES data_dir=data/mine model_dir=models/mine

Copies the model folder `start_from` to `model_dir`, prepares and renders the meshes, encodes their latents with the
model's VAE, and trains both networks from their weights: all of them, or adapters (`lora`), which are added to the
weights on export. VAEs and image encoder stay as they are, unless `structure_dit.train_image_encoder`. After a stop,
the same command continues. It also runs under torchrun; then the first rank prepares the meshes.

For the files on the way see prepare_shapes, render_views and encode_latents.
"""

import dataclasses
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from d3ds2.networks.latent_dit import LatentDiTConfig
from d3ds2.networks.structure_dit import StructureDiTConfig
from d3ds2.storage.atomic_file import replacing
from d3ds2.storage.model_folder import load_settings, network_names, read_config, save_settings
from training import encode_latents, prepare_shapes, render_views, train_dit, train_structure_dit
from training.distributed import ranks_on, run_script
from training.encode_latents import EncodeLatentsConfig
from training.prepare_shapes import PrepareShapesConfig
from training.render_views import RenderViewsConfig
from training.run_folder import exporting
from training.train_dit import TrainDiTConfig
from training.train_structure_dit import TrainStructureDiTConfig


@dataclass(frozen=True)
class FinetuneConfig:
    meshes: str = "meshes"
    data_dir: str = "data/finetune"
    model_dir: str = "models/finetune"  # the new model
    start_from: str = "d3ds2/weights/tiny"  # the model folder to fine-tune
    runs_dir: str = "runs"  # of the run folders <model>_structure_dit and <model>_dit
    stages: tuple[Literal["structure_dit", "dit"], ...] = ("structure_dit", "dit")  # those to train, in this order
    workers: int = 0  # processes that prepare meshes; 0: one per core
    views: RenderViewsConfig = field(default_factory=RenderViewsConfig)
    structure_dit: TrainStructureDiTConfig = field(
        default_factory=lambda: TrainStructureDiTConfig(train_image_encoder=False)
    )
    dit: TrainDiTConfig = field(default_factory=TrainDiTConfig)

    def __post_init__(self):
        if Path(self.model_dir).resolve() == Path(self.start_from).resolve():
            raise ValueError(f"expected another model_dir than start_from, got {self.model_dir} for both")


def main(config: FinetuneConfig) -> None:
    """Prepare what is missing, and train.

    Raises:
        ModelFolderError: `start_from` is no model folder.
        ValueError, OSError: as the scripts of the stages.
    """
    ranks = ranks_on(torch.device("cpu"))
    resolution = load_settings(config.start_from)[1].sdf_resolution
    if ranks.is_first:
        copy_model(config.start_from, config.model_dir)
        folders: dict[str, Any] = {"meshes": config.meshes, "data_dir": config.data_dir, "workers": config.workers}
        prepare_shapes.main(PrepareShapesConfig(resolutions=(resolution,), **folders))
        render_views.main(dataclasses.replace(config.views, **folders))
    ranks.wait()
    for stage in config.stages:
        if stage == "structure_dit":
            train_structure_dit.train(structure_dit_config(config, resolution))
        else:
            dit = dit_config(config, resolution)
            encode_latents.main(latents_config(config, dit))
            train_dit.train(dit)


def copy_model(start_from: str, model_dir: str) -> None:
    """Copy the networks and the sampling settings of a model folder, unless there is a model already."""
    source, target = Path(start_from), Path(model_dir)
    sampling = load_settings(source)[1]
    names = network_names(source)
    if (target / "config.json").is_file():
        load_settings(target)
        return
    with exporting(target):
        for file in [*(f"{name}.safetensors" for name in sorted(names)), "config.json"]:  # the last makes it a model
            with replacing(target / file) as temporary:
                shutil.copyfile(source / file, temporary)
        save_settings(target, target.resolve().name, sampling)


def structure_dit_config(config: FinetuneConfig, resolution: int) -> TrainStructureDiTConfig:
    """The settings of train_structure_dit, with the sizes of the model."""
    model = read_config(config.start_from, "structure_dit", StructureDiTConfig)
    return dataclasses.replace(config.structure_dit, model=model, **_of_stage(config, "structure_dit", resolution))


def dit_config(config: FinetuneConfig, resolution: int) -> TrainDiTConfig:
    """The settings of train_dit, with the sizes of the model."""
    model = read_config(config.start_from, "latent_dit", LatentDiTConfig)
    return dataclasses.replace(config.dit, model=model, **_of_stage(config, "dit", resolution))


def latents_config(config: FinetuneConfig, dit: TrainDiTConfig) -> EncodeLatentsConfig:
    """The settings of encode_latents: the model keeps the scale of its latents, which its latent DiT knows."""
    return EncodeLatentsConfig(
        config.data_dir,
        config.model_dir,
        (dit.split,),
        dit.resolution,
        max_tokens=dit.max_tokens,
        precision=dit.run.precision,
        device=dit.run.device,
        workers=dit.run.workers,
        keep_scale=True,
    )


def _of_stage(config: FinetuneConfig, stage: Literal["structure_dit", "dit"], resolution: int) -> dict[str, Any]:
    out_dir = Path(config.runs_dir) / f"{Path(config.model_dir).resolve().name}_{stage}"
    run = dataclasses.replace(getattr(config, stage).run, out_dir=str(out_dir), start_from=config.start_from)
    return {"data_dir": config.data_dir, "model_dir": config.model_dir, "resolution": resolution, "run": run}


if __name__ == "__main__":
    run_script(main, FinetuneConfig, sys.argv[1:])
