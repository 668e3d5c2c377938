"""Results that follow from a geometry alone: computed once, then kept in its `tables`."""

from functools import partial, update_wrapper
from inspect import signature
from types import FunctionType
from typing import Any


class per_grid:
    """Decorate a function of (voxels, *arguments) whose result follows from the coordinates and the arguments.

    The first call keeps the result in `voxels.tables[function, arguments]`; later calls read it there. The first
    parameter may be any object with `tables`, so methods of `Voxels` and free functions are decorated alike. The
    arguments must be hashable.
    """

    def __init__(self, function: FunctionType):
        update_wrapper(self, function)
        self._function = function
        self._signature = signature(function)
        self._defaults = tuple(parameter.default for parameter in self._signature.parameters.values())[1:]

    def key(self, *arguments) -> tuple["per_grid", tuple]:
        """Return the key of the result in `tables`, to look it up there or to store it beforehand."""
        return self, arguments + self._defaults[len(arguments) :]

    def __call__(self, voxels, *arguments, **named) -> Any:
        if named:
            bound = self._signature.bind(voxels, *arguments, **named)
            bound.apply_defaults()
            arguments = bound.args[1:]
        key = self, arguments + self._defaults[len(arguments) :]
        if key not in voxels.tables:
            voxels.tables[key] = self._function(voxels, *arguments)
        return voxels.tables[key]

    def __get__(self, voxels, owner=None) -> Any:
        return self if voxels is None else partial(self, voxels)

    def __reduce__(self) -> str:
        return self._function.__qualname__  # pickled by name, as functions are: DataLoader workers send tables


class per_grid_property(per_grid):
    """Decorate a property in the same way: `voxels.name` is the result."""

    def __get__(self, voxels, owner=None) -> Any:
        return self if voxels is None else self(voxels)
