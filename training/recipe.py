"""A recipe: the stages in which a model is trained, each a script with a config file.

A folder of files `<number>_<script>[_<word>].toml` is a recipe; its stages run in the order of the files, and a script
may come several times: `08_train_dit_256.toml`, `09_train_dit_384.toml`. A prefix such as `training/configs/tiny`
stands for the five files `tiny_vae.toml`, `tiny_structure_vae.toml`, ... in the order of `PREFIX_STAGES`.

Overrides `key=value` apply to every stage whose config has the key. With a stage's name or its script in front, they
apply to that stage or to all stages of the script: `train_dit_384.run.steps=500`, `train_dit.run.steps=500`. If
`model_dir` is given, other paths of a config that begin with that of its model folder move with it.
"""

import dataclasses
import importlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from d3ds2.storage.dataclass_values import section_of
from training.config import load_config
from training.data.shape_files import list_shapes
from training.data.views import Views
from training.run_folder import check_run, last_step

SCRIPTS = {  # the config dataclass of each
    "prepare_shapes": "PrepareShapesConfig",
    "render_views": "RenderViewsConfig",
    "train_vae": "TrainVAEConfig",
    "train_structure_vae": "TrainStructureVAEConfig",
    "train_structure_dit": "TrainStructureDiTConfig",
    "encode_latents": "EncodeLatentsConfig",
    "train_dit": "TrainDiTConfig",
}
PREFIX_STAGES = {  # the end of a config file's name: the script
    "vae": "train_vae",
    "structure_vae": "train_structure_vae",
    "structure_dit": "train_structure_dit",
    "latents": "encode_latents",
    "dit": "train_dit",
}


class Stage(NamedTuple):
    """A script and its config file."""

    name: str  # of the stage: "train_dit_384"
    script: str
    file: Path
    run_name: str  # the end of its run folder's name: "dit_384"

    def load(self, overrides: list[str]) -> Any:
        """Read the config file with these overrides. Raises as `load_config`."""
        config_class = getattr(importlib.import_module(f"training.{self.script}"), SCRIPTS[self.script])
        return load_config(config_class, [str(self.file), *overrides])


@dataclass(frozen=True)
class Job:
    """A stage with its settings."""

    stage: Stage
    arguments: list[str]  # of the script
    config: Any  # an instance of the script's config class

    @property
    def run(self) -> Any:
        """The `RunConfig` of a training script; None for the others, which check for themselves what there is to do."""
        return getattr(self.config, "run", None)

    @property
    def steps_left(self) -> int | None:
        """The steps still to train; None for a script without steps."""
        return None if self.run is None else max(self.run.steps - last_step(self.run.out_dir), 0)

    @property
    def prefix(self) -> str:
        """The prefix of its networks' names."""
        return "fine_" if getattr(self.config, "fine", False) else ""

    @property
    def writes(self) -> Path:
        """The network that a training script trains, as a path without suffix: the model folder and its name."""
        name = self.stage.script.removeprefix("train_")
        name = {"vae": f"{self.prefix}sdf_vae", "dit": f"{self.prefix}latent_dit"}.get(name, name)
        return Path(getattr(self.config, "export_dir", "") or self.config.model_dir, name)

    @property
    def reads(self) -> set[Path]:
        """The networks of other stages that it learns from, as `writes`."""
        needed = {"train_structure_dit": ["structure_vae"], "train_dit": [f"{self.prefix}sdf_vae", "structure_dit"]}
        reads = {Path(self.config.model_dir, name) for name in needed.get(self.stage.script, [])}
        if self.run is not None and self.run.start_from:
            name = getattr(self.config, "start_network", "") or self.writes.name
            reads.add(Path(self.run.start_from, name))
        return reads


def stages_of(recipe: str) -> list[Stage]:
    """List the stages of a folder or of a prefix.

    Raises:
        FileNotFoundError: there are no config files.
        ValueError: a file's name has no script.
    """
    if not Path(recipe).is_dir():
        stages = [Stage(script, script, Path(f"{recipe}_{name}.toml"), name) for name, script in PREFIX_STAGES.items()]
        for stage in stages:
            if not stage.file.is_file():
                raise FileNotFoundError(
                    f"expected a config file {stage.file}; give the part before _{stage.run_name}.toml, or a folder"
                )
        return stages
    files = sorted(Path(recipe).glob("*.toml"))
    if not files:
        raise FileNotFoundError(f"expected config files such as 01_prepare_shapes.toml in {recipe}")
    return [_stage_of(file) for file in files]


def _stage_of(file: Path) -> Stage:
    number, _, name = file.stem.partition("_")
    scripts = [script for script in SCRIPTS if f"{name}_".startswith(f"{script}_")]
    if not number.isdecimal() or not scripts:
        raise ValueError(f"expected a name such as 01_train_vae.toml of one of {', '.join(SCRIPTS)}, got {file}")
    return Stage(name, scripts[0], file, name.removeprefix("train_"))


def read_recipe(recipe: str, overrides: list[str], scripts: Collection[str] = tuple(SCRIPTS)) -> list[Job]:
    """List the stages of these scripts with their settings.

    Raises:
        ValueError: no stage knows an override, or its type is wrong.
        FileNotFoundError: config files are missing.
    """
    jobs, unknown = [], set(overrides)
    for stage in [stage for stage in stages_of(recipe) if stage.script in scripts]:
        as_written = stage.load([])
        own = {o: o.removeprefix(f"{stage.name}.").removeprefix(f"{stage.script}.") for o in overrides}
        own = {override: o for override, o in own.items() if has_key(as_written, o.partition("=")[0])}
        unknown -= own.keys()
        config = stage.load([*own.values()])
        changes = [*_moved_paths(stage, as_written, config), *own.values()]
        jobs.append(Job(stage, [str(stage.file), *changes], stage.load(changes)))
    if unknown:
        raise ValueError(f"no stage has the key of {', '.join(sorted(unknown))}")
    return jobs


def _moved_paths(stage: Stage, as_written: Any, config: Any) -> list[str]:
    """Return overrides for what follows from a `model_dir` that is not as written; given ones come later and count."""
    before, after = getattr(as_written, "model_dir", ""), getattr(config, "model_dir", "")
    if before == after:
        return []
    moved, after = [], after.rstrip("/")
    if has_key(config, "run"):
        moved.append(f"run.out_dir=runs/{Path(after).resolve().name}_{stage.run_name}")
    for key in ("run.start_from", "export_dir"):
        if has_key(config, key) and (path := _value_of(as_written, key)).startswith(before):
            moved.append(f"{key}={after}{path.removeprefix(before)}")
    return moved


def _value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def has_key(config: object, key: str) -> bool:
    """Whether a dataclass has a field of this dotted name. A section that is not given counts with all its keys."""
    hint: Any = type(config)
    for name in key.split("."):
        section = section_of(hint)
        if section is None or name not in {field.name for field in dataclasses.fields(section)}:
            return False
        hint = get_type_hints(section)[name]
    return True


# --- what can be checked before the first stage runs


def check_recipe(jobs: list[Job]) -> None:
    """Check run folders and data.

    Raises:
        ValueError: a run folder is shared by two stages, belongs to another model, or has lost its network.
        FileNotFoundError: meshes, shapes, pictures or a pretrained image encoder are missing.
    """
    check_runs([job for job in jobs if job.run is not None])
    for job in jobs:
        folder = getattr(job.config, "pretrained_encoder", "")
        if folder and job.steps_left and not Path(folder, "config.json").is_file():
            raise FileNotFoundError(f"expected a pretrained image encoder in {folder}, as {job.stage.name} needs it")
    made = {job.stage.script: job.config for job in jobs}
    if "prepare_shapes" in made:
        from training.data.meshes import list_meshes  # imports trimesh, which training itself does not need

        list_meshes(made["prepare_shapes"].meshes, made["prepare_shapes"].source)
    elif "train_dit" in made:
        config = made["train_dit"]
        names, _ = list_shapes(config.data_dir, config.split, config.resolution)
        if "render_views" not in made:
            Views(config.data_dir, names, image_size=1)


def check_runs(jobs: list[Job]) -> None:
    """Check the run folders.

    Raises:
        ValueError: two stages share a folder, or a folder does not fit the model.
    """
    owners = {}
    for job in jobs:
        out_dir, script = job.run.out_dir, job.stage.name
        other = owners.setdefault(Path(out_dir).resolve(), job)
        if other is not job:
            raise ValueError(
                f"{other.stage.name} and {script} have the same run.out_dir {out_dir}; give each its own, "
                f"as {script}.run.out_dir=FOLDER"
            )
        check_run(out_dir, job.config.model_dir)
        if not job.steps_left and not job.writes.with_suffix(".safetensors").is_file():
            raise ValueError(
                f"{script} is finished in {out_dir}, but {job.writes.parent} has no {job.writes.name}: "
                f"delete {out_dir} to train it again"
            )
