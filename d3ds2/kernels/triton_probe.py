"""The smallest Triton kernel: if it compiles and runs on a device, the others do too."""

import torch
import triton
import triton.language as tl

NUMBERS = 32


@triton.jit
def _number_kernel(out, NUMBERS: tl.constexpr):
    """One program: each place of `out` gets its number."""
    offs = tl.arange(0, NUMBERS)
    tl.store(out + offs, offs)


def probe(device: torch.device) -> None:
    """Run the kernel on a device. Raises whatever Triton raises, and RuntimeError for a wrong result."""
    out = torch.zeros(NUMBERS, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _number_kernel[(1,)](out, NUMBERS=NUMBERS)
    if out.tolist() != list(range(NUMBERS)):
        raise RuntimeError(f"a kernel of Triton gave a wrong result on {device}")
