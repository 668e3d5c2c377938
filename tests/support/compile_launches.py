"""Compile the networks' Triton launches for graphics cards that are not here.

    python -m tests.support.compile_launches --cards sm_86,gfx942 [--cases REGEX] [--part 0/2] [--report FILE.md]

First the launches are recorded as the host code chooses them for the card. Then each is compiled under a driver that
says it is the card, so that the checks of options at a launch apply too. Prints one line for each launch that does not
compile or takes more shared memory than the card has, and at the end how many did. The exit code is 1 if one failed.
To take another Triton, put its folder first in PYTHONPATH.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-cache-")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.support.cards import CARDS
from tests.support.launch_recorder import Launch, largest_of_kinds, record
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


def compile_launch(launch: Launch):
    """Compile a launch for the card of the active driver. Raises what Triton raises."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    for cache in ("device_caches", "cache"):  # what was compiled for another card
        if hasattr(kernel, cache):
            getattr(kernel, cache).clear()
    if hasattr(kernel, "binder"):
        kernel.binder = None
    values = {}
    for name, (kind, value, *rest) in launch.arguments.items():
        values[name] = _Argument(getattr(torch, value), *rest) if kind == "tensor" else value
    return kernel.warmup(grid=(1,), **values, **launch.options)


def resources(assembly: dict[str, str | bytes]) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills to memory, from what Triton has compiled."""
    if "amdgcn" in assembly:
        patterns = r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)"
        text = assembly["amdgcn"]
    else:
        patterns = r"REG:(\d+)", r"STACK:(\d+)"
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(assembly["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(pattern, text).group(1)) for pattern in patterns)
    return registers, spilled


def results(card: str, launches: list[Launch], with_resources: bool) -> list[dict]:
    """Return a row for each launch: what it takes, and the problem if it does not compile or does not fit."""
    driver.set_active(_Driver(target_of(card)))
    rows, limit = [], CARDS[card].shared_memory
    for launch in launches:
        row = {"kernel": f"{launch.module.split('.')[-1]}.{launch.kernel}", "problem": "", "launch": launch}
        try:
            compiled = compile_launch(launch)
            row["shared"] = compiled.metadata.shared
            if row["shared"] > limit:
                row["problem"] = f"takes {row['shared']} bytes of shared memory of {limit}"
            if with_resources:
                row["registers"], row["spilled"] = resources(compiled.asm)
        except Exception as error:
            cause = error.__cause__ or error
            row["problem"] = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        rows.append(row)
    return rows


def report(compiled: dict[str, list[dict]]) -> str:
    """Return a table: for each kernel and card the most shared memory, registers and spilled bytes of its launches."""
    kernels = sorted({row["kernel"] for rows in compiled.values() for row in rows})
    lines = [
        f"Triton {triton.__version__}. Each cell, the most of all launches: KiB of shared memory / registers of a "
        "thread / bytes that a thread keeps in memory for want of registers.",
        "",
        f"| kernel | {' | '.join(compiled)} |",
        f"|---|{'---|' * len(compiled)}",
    ]
    for kernel in kernels:
        cells = []
        for rows in compiled.values():
            found = [row for row in rows if row["kernel"] == kernel]
            most = [max((row.get(name, 0) for row in found), default=0) for name in ("shared", "registers", "spilled")]
            failed = " **fails**" if any(row["problem"] for row in found) else ""
            cells.append(f"{most[0] / 1024:.0f} / {most[1]} / {most[2]}{failed}" if found else "")
        lines.append(f"| {kernel.removesuffix('_kernel')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cards", default=",".join(CARDS))
    parser.add_argument("--cases", default="", help="regular expression; `subset`: one launch of each kind")
    parser.add_argument("--largest", action="store_true", help="only the largest launch of each kind")
    parser.add_argument("--part", default="0/1", help="compile every n-th launch only")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write a table of shared memory and registers")
    arguments = parser.parse_args()
    is_subset = arguments.cases == "subset"
    pattern = SUBSET if is_subset else arguments.cases
    index, parts = map(int, arguments.part.split("/"))
    recorded, compiled = {}, {}
    for card in arguments.cards.split(","):
        seen = CARDS[card]
        key = replace(seen, name="")  # cards with the same abilities get the same launches
        if key not in recorded:
            launches = record(seen, cases(seen, pattern))
            recorded[key] = largest_of_kinds(launches) if is_subset or arguments.largest else launches
        launches = recorded[key]
        rows = compiled[card] = results(card, launches[index::parts], arguments.report is not None)
        failed = [row for row in rows if row["problem"]]
        for row in failed:
            print(f"{card} {row['kernel']} ({', '.join(row['launch'].contexts)}): {row['problem']}")
        shared = max((row.get("shared", 0) for row in rows), default=0)
        print(
            f"{card}: {len(rows)} launches, {len(failed)} failed; at most {shared} bytes of shared memory", flush=True
        )
    if arguments.report is not None:
        arguments.report.write_text(report(compiled))
    counts = {card: [len(rows), sum(bool(row["problem"]) for row in rows)] for card, rows in compiled.items()}
    print(json.dumps({"triton": triton.__version__, "launches and failures": counts}))
    return 1 if any(failed for _, failed in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
