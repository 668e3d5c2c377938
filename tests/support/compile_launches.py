"""Compile the networks' Triton launches for graphics cards that are not here.

    python -m tests.support.compile_launches --cards sm_86,gfx942 [--cases REGEX] [--part 0/2]

First the launches are recorded as the host code chooses them for the card. Then each is compiled under a driver that
says it is the card, so that the checks of options at a launch apply too. Prints one line for each launch that does not
compile or takes more shared memory than the card has, and at the end how many did. The exit code is 1 if one failed.
To take another Triton, put its folder first in PYTHONPATH.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-cache-")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.support.cards import CARDS
from tests.support.launch_recorder import Launch, record
from tests.support.network_cases import SUBSET, cases


@dataclass
class _Argument:
    """An argument with a dtype and an address, instead of a tensor."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else 4

    def ptr_range(self) -> int:
        return 0


class _Driver:
    """The driver of a card that is not here."""

    def __init__(self, target: GPUTarget):
        self.target, self.utils = target, SimpleNamespace()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def target_of(card: str) -> GPUTarget:
    """Return Triton's name of a card such as sm_86 or gfx942."""
    if card.startswith("sm_"):
        return GPUTarget("cuda", int(card[3:]), 32)
    return GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)


def compile_launch(launch: Launch) -> SimpleNamespace:
    """Compile a launch for the card of the active driver; returns Triton's metadata. Raises what Triton raises."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    for cache in ("device_caches", "cache"):  # what was compiled for another card
        if hasattr(kernel, cache):
            getattr(kernel, cache).clear()
    if hasattr(kernel, "binder"):
        kernel.binder = None
    values = {}
    for name, (kind, value, *rest) in launch.arguments.items():
        values[name] = _Argument(getattr(torch, value), *rest) if kind == "tensor" else value
    return kernel.warmup(grid=(1,), **values, **launch.options).metadata


def failures(card: str, launches: list[Launch]) -> list[str]:
    """Return one line for each launch that does not compile for a card, or does not fit there."""
    driver.set_active(_Driver(target_of(card)))
    lines = []
    for launch in launches:
        try:
            shared = compile_launch(launch).shared
            limit = CARDS[card].shared_memory
            problem = "" if shared <= limit else f"takes {shared} bytes of shared memory of {limit}"
        except Exception as error:
            cause = error.__cause__ or error
            problem = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        if problem:
            lines.append(f"{card} {launch.kernel} ({', '.join(launch.contexts)}): {problem}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cards", default=",".join(CARDS))
    parser.add_argument("--cases", default="", help="regular expression; `subset`: one small network of each kind")
    parser.add_argument("--part", default="0/1", help="compile every n-th launch only")
    arguments = parser.parse_args()
    pattern = SUBSET if arguments.cases == "subset" else arguments.cases
    index, parts = map(int, arguments.part.split("/"))
    recorded, failed, counts = {}, [], {}
    for card in arguments.cards.split(","):
        seen = CARDS[card]  # cards with the same abilities get the same launches
        key = seen.backend, seen.capability == (9, 0), seen.shared_memory, seen.flash
        if key not in recorded:
            recorded[key] = record(seen, cases(seen, pattern))
        launches = recorded[key][index::parts]
        lines = failures(card, launches)
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        failed += lines
        kernels = {launch.kernel for launch in launches}
        counts[card] = [len(launches), len(kernels), len(lines)]
        print(f"{card}: {len(launches)} launches of {len(kernels)} kernels, {len(lines)} failed", flush=True)
    print(json.dumps({"triton": triton.__version__, "cards": counts}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
