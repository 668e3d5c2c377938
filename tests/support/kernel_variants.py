"""Count the variants of the kernels that Triton compiles while a network gets one structure after the other.

    python -m tests.support.kernel_variants [--card sm_86] [--uses REGEX] [--structures 12] [--compile]

A use is a network with one purpose. For each, prints a line of JSON: how many variants the first structure needs, and
how many of each kernel the later ones add. With --compile, all are compiled for the card, and the line has the
seconds of one core that it took. The launches are recorded as in launch_recorder.py, so no GPU is needed.
"""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random
from tempfile import TemporaryDirectory

import torch

from d3ds2.kernels.devices import Abilities
from d3ds2.networks.chunked_decode import decode_in_chunks
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from tests.support.cards import CARDS
from tests.support.compile_launches import results
from tests.support.launch_recorder import Launch, Recorder, recording
from tests.support.network_cases import (
    LATENT_DITS,
    SDF_VAES,
    SMALL_DITS,
    SMALL_SDF_VAE,
    image_tokens,
    latent_dit_step,
    sdf_vae_step,
    shells,
)

RESOLUTION = 32  # of the structures: the kernels see numbers of tokens, not what they stand for
DECODED_BYTES = 2 << 30
Use = Callable[[Random], None]  # runs a network on a structure that it draws


def make_uses() -> dict[str, Callable[[], Use]]:
    """Return functions that make the network of each use, by the name of the use."""
    return {
        "small latent DiT, inference": partial(_sampling, SMALL_DITS["tiny"]),
        "small latent DiT, training": partial(_training_of_latent_dit, SMALL_DITS["tiny"]),
        "small pooled latent DiT, training": partial(_training_of_latent_dit, SMALL_DITS["pooled"]),
        "small SDF VAE, decoding": partial(_decoding, SMALL_SDF_VAE),
        "small SDF VAE, training": partial(_training_of_sdf_vae, SMALL_SDF_VAE),
        "tiny latent DiT, inference": partial(_sampling, LATENT_DITS["tiny"]),
        "tiny SDF VAE, decoding": partial(_decoding, SDF_VAES["tiny"]),
        "v1.0 latent DiT, inference": partial(_sampling, LATENT_DITS["v1.0"]),
        "v1.1 latent DiT, inference": partial(_sampling, LATENT_DITS["v1.1"]),
        "v1.x SDF VAE, decoding": partial(_decoding, SDF_VAES["v1.x"]),
        "tiny latent DiT, training": partial(_training_of_latent_dit, LATENT_DITS["tiny"]),
        "tiny SDF VAE, training": partial(_training_of_sdf_vae, SDF_VAES["tiny"]),
    }


def _sampling(config: LatentDiTConfig) -> Use:
    model = LatentDiT(config).half().eval()

    @torch.no_grad()
    def run(random: Random) -> None:
        voxels = shells([random.uniform(3, 14)], RESOLUTION)
        tokens = image_tokens(1, config.context_size, torch.float16, random.randint(100, 700))
        model(torch.zeros(len(voxels), config.latent_channels), torch.zeros(1), voxels, tokens)

    return run


def _training_of_latent_dit(config: LatentDiTConfig) -> Use:
    model = LatentDiT(config).train()

    def run(random: Random) -> None:
        voxels = shells([random.uniform(3, 10) for _ in range(4)], RESOLUTION)
        latent_dit_step(model, voxels, "bf16", random.randint(100, 700))

    return run


def _decoding(config: SDFVAEConfig) -> Use:
    model = SDFVAE(config).half().eval()

    @torch.no_grad()
    def run(random: Random) -> None:
        voxels = shells([random.uniform(2, 5)], RESOLUTION)
        decode_in_chunks(model, torch.zeros(len(voxels), config.latent_channels), voxels, DECODED_BYTES)

    return run


def _training_of_sdf_vae(config: SDFVAEConfig) -> Use:
    model = SDFVAE(config).train()

    def run(random: Random) -> None:
        sdf_vae_step(model, shells([random.uniform(3, 8) for _ in range(2)], RESOLUTION, 2.5), "bf16")

    return run


def record_variants(card: Abilities, make_use: Callable[[], Use], structures: int) -> list[Launch]:
    """Return a launch of each variant; its `contexts` has the number of the structure that first needs it."""
    recorder, random = Recorder(), Random(0)
    with recording(card, recorder):
        run = make_use()
        for number in range(structures):
            recorder.context = str(number)
            run(random)
    return list(recorder.variants.values())


def _compile(card: str, variants: list[Launch]) -> tuple[float, list[str]]:
    """Compile all; the seconds that this process and its children, as ptxas, kept a core busy, and what failed."""
    started = sum(os.times()[:4])
    with TemporaryDirectory(prefix="triton-cache-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # it has nothing that other uses compiled
        problems = [row["problem"] for row in results(card, variants, False) if row["problem"]]
    return sum(os.times()[:4]) - started, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--card", default="sm_86", choices=CARDS)
    parser.add_argument("--uses", default="tiny|v1", help="regular expression")
    parser.add_argument("--structures", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="also compile all variants, and say how long it takes")
    arguments = parser.parse_args()
    for name, make_use in make_uses().items():
        if not re.search(arguments.uses, name):
            continue
        variants = record_variants(CARDS[arguments.card], make_use, arguments.structures)
        later = Counter(x.kernel for x in variants if x.contexts != ["0"])
        line = {"use": name, "first": len(variants) - later.total(), "later": later, "all": len(variants)}
        if arguments.compile:
            seconds, problems = _compile(arguments.card, variants)
            line |= {"seconds": round(seconds), "problems": problems}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
