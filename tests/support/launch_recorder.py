"""Record the Triton launches of the real networks for a card that is not here.

The networks run on CPU tensors that say they are on CUDA, and a launch is written down instead of done: kernel, types,
alignment, constants, options. So the tiles are those that the host code chooses for the card. Kernels and products
leave their results unset: only shapes and types matter.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch.nn import functional as F

from d3ds2.kernels import devices, feed_forward, linear, packed_attention
from d3ds2.kernels.devices import Abilities

os.environ.pop("TRITON_INTERPRET", None)  # a kernel of the interpreter has no types to record

from triton.runtime.jit import JITFunction


@dataclass
class Launch:
    """One launch: the arguments by name, each ("tensor", dtype, aligned), ("value", x) or (kind of number, x)."""

    module: str
    kernel: str
    arguments: dict[str, tuple]
    options: dict[str, object]
    contexts: list[str] = field(default_factory=list)

    @property
    def kind(self) -> tuple:
        """Kernel, precision, switches and options: launches of a kind differ in sizes alone.

        A kernel without a pipeline has one kind: it takes hardly any shared memory. Nor does an input that may be there
        (HAS_...) make a kind of its own: the largest launch has it.
        """
        if "num_stages" not in self.options:
            return self.module, self.kernel
        types = (x[1] for x in self.arguments.values() if x[0] == "tensor" and "int" not in x[1])
        precision = next(types, "").replace("bfloat16", "float16")
        switches = ((name, x[1]) for name, x in self.arguments.items() if isinstance(x[1], bool) and "HAS_" not in name)
        pairs = self.arguments.get("P", ("value", 0))[1] > 0
        return self.module, self.kernel, precision, *switches, pairs, *sorted(self.options.items())

    @property
    def size(self) -> int:
        """The product of all constants, doubled by each switch that is on: a measure of what a program takes."""
        constants = (x[1] for x in self.arguments.values() if x[0] == "value")
        return math.prod(x + 1 if isinstance(x, bool) else x for x in constants if isinstance(x, int) and x)


def largest_of_kinds(launches: list[Launch]) -> list[Launch]:
    """Return the largest launch of each kind."""
    largest: dict[tuple, Launch] = {}
    for launch in launches:
        if launch.kind not in largest or launch.size > largest[launch.kind].size:
            largest[launch.kind] = launch
    return list(largest.values())


class Recorder:
    """The different launches so far: one for each set of types, constants and options.

    Of launches that differ in numbers alone, that with most sizes divisible by 16 is kept: its loads are the widest.

    Args:
        variants: the first launch of each variant that Triton would compile, in the order of the launches. Triton looks
            at integers too, unless a kernel says `do_not_specialize`: whether one is 1, and whether 16 divides it.
    """

    def __init__(self):
        self.context = ""
        self.variants: dict[tuple, Launch] = {}
        self._best: dict[tuple, tuple[int, Launch]] = {}

    @property
    def launches(self) -> list[Launch]:
        return [launch for _, launch in self._best.values()]

    def note(self, kernel: JITFunction, arguments: tuple, named: dict) -> None:
        names = kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {name: named[name] for name in named if name in names}
        options = {name: value for name, value in named.items() if name not in names}
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        frozen = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        described = {name: _describe(values[name], name in constants) for name in names}
        numbers = {name: x for name, x in described.items() if x[0] == "int" and name not in frozen}
        widths = tuple((name, x[1] >= 2**31) for name, x in described.items() if x[0] == "int")
        rest = tuple((name, *x) for name, x in described.items() if x[0] not in ("int", "float"))
        key = kernel.fn.__module__, kernel.__name__, rest, widths, tuple(sorted(options.items()))
        looked_at = tuple((name, x == 1, x % 16 == 0) for name, (_, x) in numbers.items())
        launch = Launch(kernel.fn.__module__, kernel.__name__, described, options, [self.context])
        self.variants.setdefault((*key, looked_at), launch)
        score = sum(x % 16 == 0 for _, x in numbers.values()) - 10 * sum(x == 1 for _, x in numbers.values())
        found = self._best.get(key)
        contexts = found[1].contexts if found else []
        if self.context not in contexts:
            contexts.append(self.context)
        if found is None or score > found[0]:
            launch = Launch(kernel.fn.__module__, kernel.__name__, described, options, contexts)
            self._best[key] = score, launch


def _describe(value, constant: bool) -> tuple:
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0
    if constant or value is None or isinstance(value, bool | str):
        return "value", value
    if isinstance(value, int):
        return "int", value
    if isinstance(value, float):
        return "float", value
    raise TypeError(f"expected a tensor, a number or a constant, got {type(value).__name__}")


_is_autocast_enabled, _get_autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


class _Unset(torch.autograd.Function):
    """A linear layer whose result has its shape and dtype, and no value."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.inputs = [None if t is None else (t.shape, t.dtype) for t in (x, weight, bias)]
        return torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype)

    @staticmethod
    def backward(ctx, dout):
        return *(None if found is None else torch.zeros(found[0], dtype=found[1]) for found in ctx.inputs), None


def _linear(x, weight, bias=None):
    return _Unset.apply(x, weight, bias, _get_autocast_dtype("cpu") if _is_autocast_enabled("cpu") else x.dtype)


def _bmm(bias, x, weight):
    return torch.bmm(x, weight) + bias if torch.is_grad_enabled() else x.new_empty(*x.shape[:2], weight.shape[2])


def _product(a, b, dtype=None, added=None):
    return a.new_empty(len(a), b.shape[1], dtype=dtype)


@contextmanager
def recording(card: Abilities, recorder: Recorder) -> Iterator[None]:
    """Within the block, tensors say that they are on `card`, and launches go to the recorder."""
    cpu = torch.device("cpu")

    def run(self, *arguments, grid, warmup, **named):
        recorder.note(self, arguments, named)

    def varlen(q, k, v, *rest):
        return q * 0 + v.sum() * 0, q.new_zeros(q.shape[1], len(q), dtype=torch.float32)

    def zero_(tensor, *_arguments, **_named):
        return tensor.data.zero_()

    with ExitStack() as stack:
        for target, name, new in (
            (JITFunction, "run", run),
            (torch.Tensor, "is_cuda", property(lambda self: True)),
            (torch, "is_autocast_enabled", lambda device="cpu": _is_autocast_enabled("cpu")),
            (torch, "get_autocast_dtype", lambda device: _get_autocast_dtype("cpu")),
            (packed_attention, "_varlen", varlen),
            (F, "gelu", lambda x, approximate="none": x),
            (F, "scaled_dot_product_attention", lambda q, k, v, **options: q * 1),
            (F, "linear", _linear),
            (torch.nn.init, "xavier_uniform_", zero_),
            (torch.nn.init, "normal_", zero_),
            (torch, "baddbmm", _bmm),
            *((module, "product", _product) for module in (linear, feed_forward)),
            (feed_forward, "gelu_of_product", lambda a, b, added: _product(a, b)),
            (linear, "MANY_ROWS", 0),
        ):
            stack.enter_context(patch.object(target, name, new))
        stack.enter_context(patch.dict(devices._ABILITIES, {cpu: card}))
        yield


def record(card: Abilities, cases: dict[str, Callable[[], None]]) -> list[Launch]:
    """Run the cases as on `card` and return their different launches."""
    recorder = Recorder()
    with recording(card, recorder):
        for recorder.context, case in cases.items():
            case()
    return recorder.launches
