"""A device that is neither a CPU nor CUDA, in pure Python: it computes on the CPU and refuses what a Mac refuses.

    with other_device("mps") as device:
        tensor = torch.zeros(3, device=device)  # tensor.is_cpu and tensor.is_cuda are False

Real devices of this kind are MPS (a Mac), XPU (Intel) and privateuseone (DirectML). They keep their numbers elsewhere,
so whatever reads memory directly fails here as it does there. A refusal is a RuntimeError that names the operator:

    float64, which MPS lacks;
    operators that only the CPU or only CUDA has;
    tensors of the CPU, other than scalars, among those of the device;
    `.numpy()` of a tensor of the device.

torch's own code sees tensors on "meta", because its guards refuse a device that this build of torch does not have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FOREIGN_OPERATORS = ("_for_cpu", "_flash_attention", "_efficient_attention", "_cudnn", "mkldnn")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)  # their tensors may be of two devices
META = torch.device("meta")
Operator = torch._ops.OpOverload


class OtherTensor(Tensor):
    """A tensor of the device; its numbers are in `on_cpu`."""

    on_cpu: Tensor
    own_device: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor, device: torch.device) -> "OtherTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=META,
        )
        made.on_cpu, made.own_device = on_cpu, device
        return made

    device = property(lambda self: self.own_device)
    is_cpu = is_cuda = is_meta = property(lambda self: False)
    is_mps = property(lambda self: self.own_device.type == "mps")
    is_xpu = property(lambda self: self.own_device.type == "xpu")

    def tolist(self) -> list:
        return self.on_cpu.tolist()

    def __repr__(self) -> str:
        return f"OtherTensor({self.on_cpu!r}, {self.own_device})"

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        device = next(x.own_device for x in tree_flatten((args, kwargs))[0] if isinstance(x, OtherTensor))
        return _run(device, operator, args, kwargs or {})


class _NamesMeta(TorchFunctionMode):
    """Replaces the device, where a call names it, by "meta", before torch asks whether it is there."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.own_device = device

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        args = [self._rename(x) for x in args]
        kwargs = {name: self._rename(x) for name, x in (kwargs or {}).items()}
        if function is Tensor.backward:
            return self._backward(args[0])
        if function is Tensor.numpy and isinstance(args[0], OtherTensor):
            raise RuntimeError(f"numpy: a tensor on {self.own_device.type} is not in the computer's memory")
        if function is Tensor.new_tensor and isinstance(args[0], OtherTensor):  # these two do not run an operator
            function, kwargs = torch.tensor, {"dtype": args.pop(0).dtype, "device": META} | kwargs
        if function is torch.tensor and kwargs.get("device") == META:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(META)
        return function(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """Run the backward pass of a scalar in this mode, which torch would suspend: it names devices too."""
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _rename(self, x):
        named = isinstance(x, torch.device | str) and str(x).partition(":")[0] == self.own_device.type
        return META if named else x


class _Computes(TorchDispatchMode):
    """Runs the operators: those with tensors of the device, and those that make one there."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.own_device = device

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(self.own_device, operator, args, kwargs or {})


@contextmanager
def other_device(kind: str = "mps") -> Iterator[torch.device]:
    """Give the device of this type, which is there within the block."""
    device = torch.device(kind, 0)
    with _Computes(device), _NamesMeta(device):
        yield device


def _run(device: torch.device, operator: Operator, args: tuple, kwargs: dict):
    """Run an operator on the CPU, and give its result on the device if it belongs there."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [x for x in given if isinstance(x, OtherTensor)]
    wanted = kwargs.get("device")
    stays = bool(ours) if wanted is None else wanted == META
    if ours or stays:
        _check(device, operator, given, ours)
    if wanted == META:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = operator(*tree_map(_open, args), **tree_map(_open, kwargs))
    if not stays:
        return result
    written = _written(operator, args, kwargs)
    return tree_map(partial(_close, device, operator), result) if written is None else written


def _check(device: torch.device, operator: Operator, given: list[Tensor], ours: list[Tensor]) -> None:
    if any(part in operator.__name__ for part in FOREIGN_OPERATORS):
        raise RuntimeError(f"{operator}: {device.type} has no such operator")
    others = [x for x in given if not isinstance(x, OtherTensor) and x.ndim > 0]
    if ours and others and operator.overloadpacket not in COPIES:
        raise RuntimeError(f"{operator}: expected all tensors on {device.type}, got some on {others[0].device}")


def _written(operator: Operator, args: tuple, kwargs: dict):
    """Return the argument that an operator both writes to and returns, or None."""
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and len(operator._schema.returns) == 1:
            return args[place] if place < len(args) else kwargs.get(argument.name)
    return None


def _open(x):
    return x.on_cpu if isinstance(x, OtherTensor) else x


def _close(device: torch.device, operator: Operator, x):
    if not isinstance(x, Tensor):
        return x
    if x.dtype in (torch.float64, torch.complex128):
        raise RuntimeError(f"{operator}: {device.type} has no {x.dtype}")
    return OtherTensor(x, device)
