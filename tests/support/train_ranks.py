"""Train several stages on the ranks that torchrun starts; one rank may die on the way.

torchrun --nproc-per-node 2 -m tests.support.train_ranks "train_vae vae.toml" "train_dit dit.toml"
torchrun --nproc-per-node 2 -m tests.support.train_ranks "train_vae vae.toml 1 3"    # rank 1 dies after step 3
"""

import importlib
import os
import signal
import sys

import torch

from training.config import load_config
from training.distributed import run_ranks


def main(arguments: list[str]) -> None:
    for argument in arguments:
        script, toml, *death = argument.split()
        module = importlib.import_module(f"training.{script}")
        config_class = next(v for k, v in vars(module).items() if k.lower() == f"{script.replace('_', '')}config")
        if death:
            module.Log = dying(module.Log, *map(int, death))
        module.train(load_config(config_class, [toml]))


def dying(log: type, rank: int, after: int) -> type:
    """A log that kills its process, if it is this rank, after a step."""

    class Log(log):
        def __call__(self, step, metrics):
            super().__call__(step, metrics)
            if step == after and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    return Log


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_ranks(lambda: main(sys.argv[1:]))
