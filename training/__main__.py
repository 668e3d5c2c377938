"""Train a whole model: all stages in order, each in its own process.

    python -m training training/configs/tiny data_dir=data/mine model_dir=models/mine
    torchrun --nproc-per-node 8 -m training training/configs/paper meshes=MESHES data_dir=DATA model_dir=MODEL

The first argument is a folder of config files, one for each stage, or the prefix of the files `tiny_vae.toml`,
`tiny_structure_vae.toml`, ... An override applies to every stage whose config has the key. With a stage's name in
front, it applies to that stage alone: `train_vae.run.steps=500`. If a key is given twice, the later value counts. If
`model_dir` is given, checkpoints and logs go to runs/<model>_vae, ...; else to the folders that the config files name.

Stages that train need the files of prepare_shapes and render_views, which may be stages of the folder too. After a stop
or a failure, the same command continues: it skips finished stages and resumes the others. A stage that reaches
`run.max_minutes` exports its model, and the next one begins. Under torchrun, all ranks share each stage;
`python -m training.plan FOLDER gpus=8xA100` says beforehand what a recipe takes.
"""

import os
import signal
import socket
import subprocess
import sys

import torch

from training.command import PARENT, split_debug
from training.distributed import Ranks, ranks_on, run_ranks
from training.recipe import Job, check_recipe, read_recipe

BY_SHARE = ("prepare_shapes", "render_views")  # scripts whose ranks each take a share of the meshes


def plan(recipe: str, overrides: list[str]) -> list[Job]:
    """List the stages with their settings, and check what can be checked before the first one runs.

    Raises:
        ValueError: as `read_recipe` and `check_recipe`.
        FileNotFoundError: config files, meshes, shapes or pictures are missing.
    """
    jobs = read_recipe(recipe, overrides)
    check_recipe(jobs)
    return jobs


def train(jobs: list[Job], ranks: Ranks, options: list[str]) -> int:
    """Run the stages, with further options for each script.

    Returns:
        The exit code, equal on all ranks: 0, that of a stage that failed, or 128 + the signal that stopped it.
    """
    process, stopped_by, changed = None, 0, {}

    def say(line: str) -> None:
        if ranks.is_first:
            print(line, flush=True)

    def stop(number, _frame):
        nonlocal stopped_by
        stopped_by = number
        if process is not None and number == signal.SIGTERM:  # Ctrl-C reaches the stage by itself
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for place, job in enumerate(jobs, start=1):
        name, left = job.stage.name, ranks.from_first(job.steps_left)
        head = f"[{place}/{len(jobs)}] {name}"
        if left == 0:
            say(f"{head}: finished, {job.run.steps} steps")
            if news := sorted(changed[network] for network in job.reads & changed.keys()):
                say(f"  before {' and '.join(news)} went on: delete {job.run.out_dir} to train it again")
            continue
        say(head if left is None else f"{head}: {left} steps left, logs in {job.run.out_dir}")
        command = [sys.executable, "-m", f"training.{job.stage.script}", *arguments_on(job, ranks), *options]
        process = subprocess.Popen(command, env=environment_of_stage(ranks))
        codes, signals = zip(*ranks.all((process.wait(), stopped_by)), strict=True)
        code, stopped = next((code for code in codes if code), 0), max(signals)
        is_cut_short = left and not job.run.max_minutes and ranks.from_first(job.steps_left)
        if stopped or (code == 0 and is_cut_short):
            say(f"stopped in {name}; the same command continues from there")
            return 128 + (stopped or signal.SIGTERM)
        if code != 0:
            say(f"{name} failed with exit code {code}, see above; fix the cause and run the same command to continue")
            return code if code > 0 else 128 - code
        if job.run is not None:
            changed[job.writes] = name
    if trained := [job for job in jobs if job.run is not None]:
        model_dir = trained[-1].config.model_dir
        say(f"the model is in {model_dir}: python -m d3ds2 PICTURE.png -o mesh.glb --model {model_dir}")
    return 0


def arguments_on(job: Job, ranks: Ranks) -> list[str]:
    """The arguments of a stage on this rank: where meshes are prepared, its share of them and of the cores."""
    if ranks.size == 1 or job.stage.script not in BY_SHARE or job.config.shard != "0/1":
        return job.arguments
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return [*job.arguments, f"shard={ranks.rank}/{ranks.size}", f"workers={job.config.workers or max(cores, 1)}"]


def environment_of_stage(ranks: Ranks) -> dict[str, str]:
    """The environment of a stage's process, which ends with this one: its ranks connect with each other, apart from
    those of other stages.

    torchrun's own store would still hold the addresses of the stage before, so the first rank opens another one.
    """
    environment = os.environ | {PARENT: str(os.getpid())}
    if ranks.size == 1:
        return environment
    port = ranks.from_first(free_port() if ranks.is_first else 0)
    return environment | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def free_port() -> int:
    """Return a port that no process of this machine listens on."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def main(arguments: list[str]) -> int:
    """Run the command line, and exit; return the exit code if nothing runs."""
    arguments, debug = split_debug(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        jobs = plan(arguments[0], arguments[1:])
    except (ValueError, OSError) as error:
        if debug:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    options = ["--debug"] if debug else []
    run_ranks(lambda: sys.exit(train(jobs, ranks_on(torch.device("cpu")), options)), debug)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
