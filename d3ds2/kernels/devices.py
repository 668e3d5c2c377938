"""The abilities of a device: the only place that asks which GPU there is, and whether Triton works on it.

Each device is asked once, when a kernel first runs on it. Everything else reads the answers here, so an older card, a
Mac, or a computer without a C compiler takes another way through the same operations instead of failing.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
HAS_SPCONV = find_spec("spconv") is not None  # its CPU build included
KIB = 1 << 10
# Shared memory that one program may take, in KiB, for versions of torch that do not tell.
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
PRECISIONS = ("auto", "fp16", "bf16", "fp32")
# Triton has no tensor cores of older cards: there a kernel of attention would keep 6 to 12 KB of each thread in memory,
# and compile for a minute
OLDEST_FOR_TRITON = (8, 0)
OLDEST_FOR_FLASH = OLDEST_FOR_BF16 = (8, 0)
TRITON = "triton-windows" if sys.platform == "win32" else "triton"  # the package to install


@dataclass(frozen=True)
class Abilities:
    """The facts about a device that decide which kernels run on it, and in which tiles.

    Args:
        name: for messages, such as "NVIDIA GeForce RTX 4090".
        backend: "cuda", "hip" (a GPU of AMD), or the type of the torch device: "cpu", "mps", "xpu", …
        capability: compute capability of CUDA, (0, 0) elsewhere.
        shared_memory: bytes that one program of a kernel may take.
        multiprocessors: programs that run at once without sharing anything.
        triton: whether Triton's kernels compile and run.
        why_no_triton: what keeps them from it, and the remedy; "" where they run.
        flash: whether torch has FlashAttention over samples of different lengths.
        bf16: whether the device computes in bfloat16 by itself.
    """

    name: str
    backend: str
    capability: tuple[int, int] = (0, 0)
    shared_memory: int = 48 * KIB
    multiprocessors: int = 1
    triton: bool = False
    why_no_triton: str = ""
    flash: bool = False
    bf16: bool = True

    def stages(self, wanted: int, bytes_of_stage: int, other_bytes: int = 0) -> int:
        """Return how many of the `wanted` stages of a kernel's pipeline fit into shared memory, at least 1.

        All stages but one have a buffer of `bytes_of_stage` there, beside `other_bytes`.
        """
        return max(1, min(wanted, 1 + (self.shared_memory - other_bytes) // max(1, bytes_of_stage)))

    @property
    def limits_registers(self) -> bool:
        """Whether a tile's limit on registers holds: on Hopper, where it was measured, alone.

        Elsewhere a thread would keep more in memory for it (benchmarks/results/compiled-kernels.md), and AMD's compiler
        knows no such limit.
        """
        return self.backend == "cuda" and self.capability == (9, 0)

    @property
    def kernels(self) -> str:
        """One line that says which kernels run."""
        if self.backend not in ("cuda", "hip"):
            return f"torch on {'the CPU' if self.backend == 'cpu' else self.name}"
        if self.triton:
            return f"Triton {_version('triton', 'triton-windows')} on {self.name}"
        return f"no Triton on {self.name}" + (f": {self.why_no_triton}" if self.why_no_triton else "")


_ABILITIES: dict[torch.device, Abilities] = {}


def abilities(device: torch.device) -> Abilities:
    """Return the abilities of a device. The first question about a GPU compiles and runs a tiny kernel there."""
    found = _ABILITIES.get(device)
    if found is None and device.type == "cuda" and device.index is None:
        return abilities(torch.device("cuda", torch.cuda.current_device()))
    if found is None:
        found = _ABILITIES[device] = _ask(device)
        if found.why_no_triton:
            logging.warning(f"Direct3D-S2: {found.kernels}")
    return found


def pretend(device: torch.device, **changes) -> None:
    """Take a device for a lesser one from now on, as tests and benchmarks do: `changes` of its `Abilities`."""
    _ABILITIES[device] = replace(abilities(device), **changes)


def _constant_when_compiled(function: Callable) -> Callable:
    """Do as torch.compiler.assume_constant_result, which imports torch's compiler, and that takes seconds."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@_constant_when_compiled
def triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    return abilities(device).triton


@_constant_when_compiled
def has_flash(device: torch.device) -> bool:
    """Whether torch has FlashAttention over samples of different lengths for a device."""
    return abilities(device).flash


def sums_between(device: torch.device) -> str:
    """Return the backend of torch.distributed that sums tensors of this kind of device over processes.

    Raises:
        ValueError: there is none.
    """
    backends = {"cpu": "gloo", "cuda": "nccl"}
    if device.type not in backends:
        raise ValueError(f"expected a CUDA device or the CPU for several processes, got {device}")
    return backends[device.type]


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: MPS does not, nor do most devices of Intel and DirectML."""
    return device.type in ("cpu", "cuda")


def runs_on_cpu(device: torch.device) -> bool:
    """Whether a device is the CPU, where a layer may take seconds."""
    return device.type == "cpu"


def shares_memory(device: torch.device) -> bool:
    """Whether a device has no memory but the computer's, so that keeping weights there saves nothing."""
    return device.type in ("cpu", "mps")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU of NVIDIA or AMD; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def copies_in_background(device: torch.device) -> bool:
    """Whether copies to a device may go on while the host does; elsewhere they may read memory that has changed."""
    return device.type == "cuda"


def trains_in_bf16(device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast; elsewhere it runs in float32."""
    return device.type in ("cuda", "xpu") and abilities(device).bf16


def make_generator(device: torch.device) -> torch.Generator:
    """Return a generator of random numbers on a device, or on the CPU where the device has none."""
    try:
        return torch.Generator(device)
    except RuntimeError:
        return torch.Generator()


def has_autocast(device: torch.device) -> bool:
    """Whether torch knows autocast for a type of device; it raises errors for the others."""
    return torch.amp.is_autocast_available(device.type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, None where it is off."""
    if not has_autocast(device) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """The context in which autocast is off."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def on_cuda(x: Tensor) -> bool:
    """Whether a tensor of any shape lies on a GPU of NVIDIA or AMD, which has all of torch's operators."""
    return x.is_cuda


def is_half(x: Tensor) -> bool:
    """Whether a tensor of any shape is in half precision."""
    return x.dtype in (torch.float16, torch.bfloat16)


def flash_takes(q: Tensor) -> bool:
    """Whether torch's FlashAttention over samples of different lengths takes these queries (..., D)."""
    return q.is_cuda and has_flash(q.device) and is_half(q) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def memory_efficient_takes(q: Tensor) -> bool:
    """Whether torch's memory-efficient attention, which Windows has too, takes these queries (..., D)."""
    return q.is_cuda and abilities(q.device).backend == "cuda" and is_half(q) and q.shape[-1] % 8 == 0


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor, of any shape."""
    return x.is_cuda and triton_works(x.device)


def on_spconv(x: Tensor) -> bool:
    """Whether spconv may run on this tensor, of any shape: its GPU has no Triton, and spconv is installed."""
    return x.is_cuda and HAS_SPCONV and not on_triton(x)


def half_on_triton(x: Tensor) -> bool:
    """`on_triton` for kernels that compute in float32 or less: a tensor of float64 keeps the definition."""
    return on_triton(x) and x.dtype != torch.float64


def find_device(name: str | None = None, index: int | None = None) -> torch.device:
    """Return the device of a name; None or "auto" is the first that is there of CUDA, XPU, MPS and the CPU.

    Args:
        index: which of this machine's GPUs of NVIDIA or AMD a process takes that shares the machine with others. The
            GPU becomes torch's current one, before anything else is asked of it. None: the one that the name says.

    Raises:
        ValueError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available, "xpu": torch.xpu.is_available, "mps": torch.backends.mps.is_available}
    if name in (None, "auto"):
        name = next((kind for kind, is_available in there.items() if is_available()), "cpu")
    device = torch.device(name)
    if device.type in there and not there[device.type]():
        raise ValueError(f"expected a device that is here, got {name}; use cpu")
    if device.type == "cuda" and index is not None:
        if index >= (count := torch.cuda.device_count()):
            raise ValueError(f"expected at most {count} processes here, one for each GPU, got process {index + 1}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    abilities(device)  # what it cannot do is said now, not in the middle of the work
    return device


def find_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of networks for "auto", "fp16", "bf16" or "fp32": auto is fp32 on the CPU, fp16 elsewhere.

    A device that cannot compute in bfloat16 gets fp16, and a warning says so.
    """
    if precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if dtype == torch.bfloat16 and not abilities(device).bf16:
        logging.warning(f"Direct3D-S2: {abilities(device).name} cannot compute in bf16; it computes in fp16 instead")
        return torch.float16
    return dtype


def _ask(device: torch.device) -> Abilities:
    if device.type == "mps":
        return Abilities(
            "mps", "mps", bf16=torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0)
        )
    if device.type != "cuda":
        return Abilities(device.type, device.type, bf16=device.type != "privateuseone")  # DirectML has none
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:  # torch's FlashAttention for AMD has not been tried with samples of many lengths
        backend, capability, shared, flash = "hip", (0, 0), properties.shared_memory_per_block, False
    else:
        backend, capability = "cuda", (properties.major, properties.minor)
        shared = getattr(properties, "shared_memory_per_block_optin", 0) or SHARED_KIB.get(capability, 48) * KIB
        flash = capability >= OLDEST_FOR_FLASH and torch.backends.cuda.is_flash_attention_available()
    why_not = _why_no_triton(device, backend, capability)
    return Abilities(
        properties.name,
        backend,
        capability,
        shared,
        properties.multi_processor_count,
        triton=not why_not,
        why_no_triton=why_not,
        flash=flash,
        bf16=backend == "hip" or capability >= OLDEST_FOR_BF16,
    )


def _why_no_triton(device: torch.device, backend: str, capability: tuple[int, int]) -> str:
    """Return what keeps Triton's kernels from running, and the remedy, in one line; "" if nothing does."""
    if backend == "cuda" and capability < OLDEST_FOR_TRITON:
        needed, found = (".".join(map(str, numbers)) for numbers in (OLDEST_FOR_TRITON, capability))
        return f"the kernels need a GPU of compute capability {needed} or newer, and this one has {found}"
    if not HAS_TRITON:
        return f"pip install {TRITON} makes everything 4 to 20 times faster"
    try:
        from .triton_probe import probe

        probe(device)
    except Exception as error:  # whatever it is, the kernels in torch do the work
        return f"{' '.join(str(error).split())[:200] or type(error).__name__}. {_remedy(str(error))}"
    return ""


def _remedy(error: str) -> str:
    if "compiler" in error.lower() or "Python.h" in error:
        if sys.platform == "win32":
            return (
                "Remedy: pip install -U triton-windows, which brings a compiler; an embedded Python also needs its "
                "include and libs folders"
            )
        return "Remedy: install a C compiler and Python's headers, such as apt install gcc python3-dev"
    return f"Remedy: pip install -U {TRITON}, in the version that belongs to torch {torch.__version__.split('+')[0]}"


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "?"
