"""Training on 1, 2, 4 and 8 GPUs of a machine: speed, equal losses, the death of a rank.

    python benchmarks/scaling.py --gpus 1 2 4 8
    python benchmarks/scaling.py --tiny --gpus 1 2 --out /tmp/scaling    # small networks on the CPU, to try it

1. Steps of the latent DiT, the SDF VAE and the structure DiT, with copied and with sharded weights. Each GPU has as
   many samples as in the paper, so the ideal is N times the tokens a second of one GPU. The device is waited for after
   each phase of a step: loading a batch; the losses and their gradients (with sharded weights, these include all
   traffic); waiting for the rank with the most tokens; summing the gradients and moving the weights.
2. The losses of a run on N GPUs beside those on one GPU that accumulates N parts, and beside the same run again.
3. One rank is killed with SIGKILL: how long until all have ended, and with which lines; and a resume on one GPU fewer.

Prints tables and writes them to benchmarks/results/scaling-*.md. `benchmarks/scaling_work.py` runs on the ranks.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.scaling_work import CASES, Work  # noqa: E402

PARTS = ("speed", "losses", "death")
SPEED = ["case", "GPUs", "weights", "ms", "tokens/s", "share of ideal", "GiB"]
SPEED += ["data ms", "compute ms", "waiting ms", "update ms", "max/mean tokens"]
FIRST_STEPS = (1, 5, 20, 60)
LOSSES = [
    "case",
    "ranks × parts",
    *(f"step {n}" if n == 1 else f"steps 1 to {n}" for n in FIRST_STEPS),
    "all steps",
    "last losses",
]
SMALL = "latent DiT 256"  # for the death
COMPARED = ("latent DiT 256", "SDF VAE 384")  # whose losses are compared


@dataclasses.dataclass(frozen=True)
class Ended:
    """Ranks that have ended.

    Attributes:
        code: torchrun's exit code.
        result: what the first rank wrote; {} if it did not end well.
        errors: the last line that each rank wrote to its standard error, if any.
        seconds: from the start to the end.
    """

    code: int
    result: dict
    errors: list[str]
    seconds: float


def run_ranks(ranks: int, folder: Path, **work) -> Ended:
    """Run `scaling_work` on some ranks."""
    logs = Path(tempfile.mkdtemp(dir=folder))
    out = logs / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", str(logs), "--redirects", "3", "-m", "benchmarks.scaling_work"]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if work.get("tiny") else {})
    began = time.monotonic()
    ended = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(Work(out=str(out), **work)))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - began
    texts = [file.read_text().strip().splitlines() for file in sorted(logs.rglob("stderr.log"))]
    result = json.loads(out.read_text()) if out.exists() else {}
    return Ended(ended.returncode, result, [lines[-1] for lines in texts if lines], seconds)


def speed_rows(cases: list[str], gpus: list[int], warm_up: int, tiny: bool, folder: Path) -> Iterator[list[str]]:
    """Measure the cases on each number of GPUs, with copied and sharded weights: a row of SPEED each."""
    options = {"tiny": tiny, "steps": 3, "warm_up": 1} if tiny else {"tiny": False, "warm_up": warm_up}
    for case in cases:
        alone = 0.0  # tokens a second
        for ranks in gpus:
            for sharded in (False, True) if ranks > 1 else (False,):
                ended = run_ranks(ranks, folder, case=case, batch=CASES[case][1] * ranks, sharded=sharded, **options)
                row = [case, str(ranks), "sharded" if sharded else "copied"]
                if ended.code:
                    row += [f"failed: {'; '.join(ended.errors[-1:])}", *[""] * (len(SPEED) - 4)]
                else:
                    found, ms = ended.result, sum(ended.result["ms"].values())
                    rate = found["tokens"] / ms * 1000
                    alone = alone or rate / ranks
                    row += [f"{ms:.0f}", f"{rate:,.0f}", f"{rate / ranks / alone:.1%}", f"{found['gib']:.1f}"]
                    row += [f"{part:.1f}" for part in found["ms"].values()] + [f"{found['imbalance']:.3f}"]
                yield row


def loss_rows(case: str, ranks: int, steps: int, tiny: bool, folder: Path) -> Iterator[list[str]]:
    """Train on N ranks, and twice on one rank with N parts; a row of LOSSES for each of the two comparisons.

    On one rank, the whole batch takes the place of N ranks, beside two parts. Two equal runs differ by what the device
    computes in another order each time, and training makes that grow.
    """
    parts = max(ranks, 2)
    forms = [(ranks, 1), (1, parts), (1, parts)]
    options = {"case": case, "batch": 4 * parts, "steps": steps, "warm_up": 0, "tiny": tiny}
    ended = [run_ranks(n, folder, accumulate=accumulate, **options) for n, accumulate in forms]
    for first, second in ((0, 1), (1, 2)):
        names = [f"{n} × {accumulate}" for n, accumulate in (forms[first], forms[second])]
        row = [case, f"{names[0]}, {names[1]}" + (" again" if names[0] == names[1] else "")]
        failed = [run for run in (ended[first], ended[second]) if run.code]
        if failed:
            yield [*row, f"failed: {'; '.join(failed[0].errors[-1:])}", *[""] * (len(LOSSES) - 3)]
            continue
        pairs = [*zip(ended[first].result["losses"].values(), ended[second].result["losses"].values(), strict=True)]
        apart = [abs(a - b) / abs(b) for a, b in pairs]
        first_steps = [f"{max(apart[:number]):.1e}" for number in FIRST_STEPS]
        yield [*row, *first_steps, f"{max(apart):.1e}", f"{pairs[-1][0]:.6f}, {pairs[-1][1]:.6f}"]


def kill_a_rank(ranks: int, tiny: bool, folder: Path) -> list[str]:
    """Kill a rank after step 12 of 20, resume on one fewer, and compare with a run that was not killed."""
    options = {"case": SMALL, "batch": 8, "steps": 20, "warm_up": 0, "tiny": tiny}
    whole = run_ranks(ranks, folder, run_dir=str(folder / "whole"), **options)
    killed = run_ranks(ranks, folder, run_dir=str(folder / "killed"), die_at=12, **options)
    resumed = run_ranks(ranks - 1, folder, run_dir=str(folder / "killed"), **options)
    if whole.code or resumed.code or not killed.code:
        return [f"{ranks} GPUs: failed: {'; '.join(whole.errors + killed.errors + resumed.errors)}"]
    first = min(map(int, resumed.result["losses"]))
    pairs = [(loss, whole.result["losses"][step]) for step, loss in resumed.result["losses"].items()]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    return [
        f"Rank {ranks - 1} of {ranks} was killed after step 12. All had ended {killed.seconds:.0f} s after their start "
        f"(20 steps without a death took {whole.seconds:.0f} s), with these lines:",
        "",
        *[f"    {line}" for line in killed.errors],
        "",
        f"On {ranks - 1} GPUs, the run went on from step {first - 1}. Its losses up to step 20 differ from those of a "
        f"run without a death by at most {worst:.1e} of their value.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="for the speed and the losses")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--warm-up", type=int, default=10, help="steps before those that count for the speed")
    parser.add_argument("--steps", type=int, default=200, help="for the losses")
    parser.add_argument("--tiny", action="store_true", help="small networks and shapes on the CPU, with gloo")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    device = "CPU" if arguments.tiny else torch.cuda.get_device_name()
    several = [ranks for ranks in sorted(arguments.gpus) if ranks > 1]
    lines = ["# Training on several GPUs", ""]
    lines += [f"{datetime.date.today()}, {device}, torch {torch.__version__}. `python benchmarks/scaling.py`.", ""]

    def add(*more: str) -> None:
        """Print lines, and write all lines so far: what was measured is kept when the rest fails."""
        print("\n".join(more), flush=True)
        lines.extend(more)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"scaling-{device.split()[-1].lower()}.md").write_text("\n".join(lines).rstrip() + "\n")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in arguments.parts:
            add(f"| {' | '.join(SPEED)} |", f"| {' | '.join(['---'] * len(SPEED))} |")
            for row in speed_rows(arguments.cases, sorted(arguments.gpus), arguments.warm_up, arguments.tiny, folder):
                add(f"| {' | '.join(row)} |")
            add("")
        if "losses" in arguments.parts:
            add(f"Largest differences of the losses of {arguments.steps} steps, as a share of their value:", "")
            add(f"| {' | '.join(LOSSES)} |", f"| {' | '.join(['---'] * len(LOSSES))} |")
            for case, ranks in itertools.product([c for c in COMPARED if c in arguments.cases], several or [1]):
                for row in loss_rows(case, ranks, arguments.steps, arguments.tiny, folder):
                    add(f"| {' | '.join(row)} |")
            add("")
        if "death" in arguments.parts and several:
            add(*kill_a_rank(several[-1], arguments.tiny, folder), "")


if __name__ == "__main__":
    main()
