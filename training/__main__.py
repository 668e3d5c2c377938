"""Train a whole model: all stages in order, each in its own process.

    python -m training training/configs/tiny data_dir=data/mine model_dir=models/mine

The first argument is the prefix of the config files: `tiny_vae.toml`, `tiny_structure_vae.toml`, ... An override
applies to every stage whose config has the key. With a stage's name in front, it applies to that stage alone:
`train_vae.run.steps=500`. If a key is given twice, the later value counts. If `model_dir` is given, checkpoints and
logs go to runs/<model>_vae, ...; else to the folders that the config files name.

Needs the files of prepare_shapes and render_views. After a stop or a failure, the same command continues: it skips
finished stages and resumes the others. A stage that reaches `run.max_minutes` exports its model, and the next one
begins.
"""

import dataclasses
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from training.config import load_config
from training.data.shape_files import list_shapes
from training.data.views import Views
from training.encode_latents import EncodeLatentsConfig
from training.run_folder import check_run, last_step
from training.train_dit import TrainDiTConfig
from training.train_structure_dit import TrainStructureDiTConfig
from training.train_structure_vae import TrainStructureVAEConfig
from training.train_vae import TrainVAEConfig


class Stage(NamedTuple):
    """A script of the chain."""

    script: str
    config_class: type
    name: str  # of its config file and its run folder
    network: str  # that it writes to `model_dir`
    needs: tuple[str, ...] = ()  # scripts whose networks it learns from


STAGES = (
    Stage("train_vae", TrainVAEConfig, "vae", "sdf_vae"),
    Stage("train_structure_vae", TrainStructureVAEConfig, "structure_vae", "structure_vae"),
    Stage("train_structure_dit", TrainStructureDiTConfig, "structure_dit", "structure_dit", ("train_structure_vae",)),
    Stage("encode_latents", EncodeLatentsConfig, "latents", "sdf_vae"),
    Stage("train_dit", TrainDiTConfig, "dit", "latent_dit", ("train_vae", "train_structure_dit")),
)


@dataclass(frozen=True)
class Job:
    """A stage with its settings."""

    stage: Stage
    arguments: list[str]  # of the script
    config: Any  # an instance of stage.config_class

    @property
    def steps_left(self) -> int | None:
        """The steps still to train; None for encode_latents, which checks for itself what there is to do."""
        run = getattr(self.config, "run", None)
        return None if run is None else max(run.steps - last_step(run.out_dir), 0)


def plan(prefix: str, overrides: list[str]) -> list[Job]:
    """List the stages with their settings, and check what can be checked before the first one runs.

    Raises:
        ValueError: no stage knows an override, or its type is wrong; or a run folder is shared by two stages, belongs
            to another model, or has lost its network.
        FileNotFoundError: config files, shapes or pictures are missing.
    """
    jobs, unknown = [], set(overrides)
    for stage in STAGES:
        file = f"{prefix}_{stage.name}.toml"
        if not Path(file).is_file():
            raise FileNotFoundError(f"expected a config file {file}; give the part before _{stage.name}.toml")
        as_written = load_config(stage.config_class, [file])
        own = {override: override.removeprefix(f"{stage.script}.") for override in overrides}
        own = {override: o for override, o in own.items() if has_key(as_written, o.partition("=")[0])}
        unknown -= own.keys()
        config = load_config(stage.config_class, [file, *own.values()])
        arguments = [file, *own.values()]
        if has_key(config, "run") and config.model_dir != as_written.model_dir:
            out_dir = f"runs/{Path(config.model_dir).resolve().name}_{stage.name}"
            arguments.insert(1, f"run.out_dir={out_dir}")  # a given one comes later and counts
            config = load_config(stage.config_class, arguments)
        jobs.append(Job(stage, arguments, config))
    if unknown:
        raise ValueError(f"no stage has the key of {', '.join(sorted(unknown))}")
    check_runs([job for job in jobs if job.steps_left is not None])
    check_data(jobs[-1].config)
    return jobs


def has_key(config: object, key: str) -> bool:
    """Whether a dataclass has a field of this dotted name."""
    for name in key.split("."):
        if not dataclasses.is_dataclass(config) or name not in {field.name for field in dataclasses.fields(config)}:
            return False
        config = getattr(config, name)
    return True


def check_runs(jobs: list[Job]) -> None:
    """Check the run folders.

    Raises:
        ValueError: two stages share a folder, or a folder does not fit the model.
    """
    owners = {}
    for job in jobs:
        out_dir, model_dir = job.config.run.out_dir, Path(job.config.model_dir)
        other = owners.setdefault(Path(out_dir).resolve(), job)
        if other is not job:
            raise ValueError(
                f"{other.stage.script} and {job.stage.script} have the same run.out_dir {out_dir}; give each its own, "
                f"as {job.stage.script}.run.out_dir=FOLDER"
            )
        check_run(out_dir, model_dir)
        if not job.steps_left and not (model_dir / f"{job.stage.network}.safetensors").is_file():
            raise ValueError(
                f"{job.stage.script} is finished in {out_dir}, but {model_dir} has no {job.stage.network}: "
                f"delete {out_dir} to train it again"
            )


def check_data(config: TrainDiTConfig) -> None:
    """Check that there are shapes and pictures of them.

    Raises:
        FileNotFoundError: some are missing; the message names the command that makes them.
    """
    names, _ = list_shapes(config.data_dir, config.split, config.resolution)
    Views(config.data_dir, names, image_size=1)


def train(jobs: list[Job]) -> int:
    """Run the stages. Return the exit code: 0, that of a stage that failed, or 128 + the signal that stopped it."""
    process, stopped_by, changed = None, 0, set()

    def stop(number, _frame):
        nonlocal stopped_by
        stopped_by = number
        if process is not None and number == signal.SIGTERM:  # Ctrl-C reaches the stage by itself
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for place, job in enumerate(jobs, start=1):
        script, left = job.stage.script, job.steps_left
        head = f"[{place}/{len(jobs)}] {script}"
        if left == 0:
            say(f"{head}: finished, {job.config.run.steps} steps")
            if news := changed.intersection(job.stage.needs):
                say(f"  before {' and '.join(sorted(news))} went on: delete {job.config.run.out_dir} to train it again")
            continue
        say(head if left is None else f"{head}: {left} steps left, logs in {job.config.run.out_dir}")
        process = subprocess.Popen([sys.executable, "-m", f"training.{script}", *job.arguments])
        code = process.wait()
        if stopped_by or (code == 0 and job.steps_left and not job.config.run.max_minutes):
            say(f"stopped in {script}; the same command continues from there")
            return 128 + (stopped_by or signal.SIGTERM)
        if code != 0:
            say(f"{script} failed with exit code {code}, see above; fix the cause and run the same command to continue")
            return code if code > 0 else 128 - code
        changed.add(script)
    model_dir = jobs[-1].config.model_dir
    say(f"the model is in {model_dir}: python -m d3ds2 PICTURE.png -o mesh.glb --model {model_dir}")
    return 0


def say(line: str) -> None:
    """Print a line before a stage prints its own."""
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        jobs = plan(arguments[0], arguments[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return train(jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
