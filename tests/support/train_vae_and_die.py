"""Train the SDF VAE on the ranks that torchrun starts; one rank dies on the way.

torchrun --nproc-per-node 2 -m tests.support.train_vae_and_die vae.toml 1 3    # rank 1 dies after step 3
"""

import os
import signal
import sys

import torch

from training import loop, train_vae
from training.config import load_config
from training.distributed import run_ranks


def main(toml: str, rank: str, after: str) -> None:
    loop.Log = dying(loop.Log, int(rank), int(after))
    train_vae.train(load_config(train_vae.TrainVAEConfig, [toml]))


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
    run_ranks(lambda: main(*sys.argv[1:]))
