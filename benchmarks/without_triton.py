"""The latent DiT where Triton, or torch's FlashAttention too, is not there: times and memory beside those with both.

    python benchmarks/without_triton.py --parity ../shared/parity

24 blocks of 1024 channels in float16, random weights and latents, on a real structure of 84,820 latent voxels and on
its coarsening. Prints a table and writes it to benchmarks/results/without-triton-*.md.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.dit import V10, V11, image_tokens, make_model, median_ms, peak_gib, start_of_memory, write_table  # noqa: E402
from benchmarks.structures import real_voxels  # noqa: E402
from d3ds2.geometry.voxels import Voxels  # noqa: E402
from d3ds2.kernels import devices  # noqa: E402

HIDDEN = {  # what the GPU is taken for
    "Triton": {},
    "no Triton": {"triton": False},
    "no Triton, no FlashAttention": {"triton": False, "flash": False},
}


@torch.no_grad()
def time_pass(voxels: Voxels, form: dict, copies: int, runs: int) -> tuple[float, float]:
    """Milliseconds of one pass with `copies` guidance branches, and its peak memory with the weights, GiB."""
    start = start_of_memory()
    model = make_model(form, 8, torch.float16).eval()
    batch, context = voxels.repeat(copies), image_tokens(copies, 0.5 if form["sparse_context"] else 1.0)
    x, t = torch.randn(len(batch), 16, device="cuda").half(), torch.full((copies,), 0.5, device="cuda")
    return median_ms(lambda: model(x, t, batch, context), runs), peak_gib(start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parity", type=Path, default=ROOT.parent / "shared" / "parity")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    whole = devices.abilities(device)

    lines = [["tokens", "branches", "form", "without", "ms", "times Triton's", "GiB"]]
    lines += [["---"] * len(lines[0])]
    for factor, copies in ((2, 2), (1, 1)):
        voxels = real_voxels(arguments.parity, "cuda", factor)
        for label, form in (("v1.1, m_cmp 8", V11), ("v1.0, m_cmp 4", V10)):
            first = None
            for name, changes in HIDDEN.items():
                devices.pretend(device, triton=whole.triton, flash=whole.flash)
                devices.pretend(device, **changes)
                ms, gib = time_pass(voxels, form, copies, 3 if changes else 7)
                first = first or ms
                cells = [f"{len(voxels):,}", copies, label, name, f"{ms:.0f}", f"{ms / first:.1f}", f"{gib:.2f}"]
                lines.append([str(cell) for cell in cells])
                print(" | ".join(lines[-1]), flush=True)
    about = "Weights and latents in float16. `python benchmarks/without_triton.py`."
    write_table(arguments.out, "without-triton", "The latent DiT without Triton", about, lines)


if __name__ == "__main__":
    main()
