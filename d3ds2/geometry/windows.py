"""Attention windows: which tokens attend to each other.

N  voxels, all samples packed      W  occupied attention windows
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """A partition of the voxels into attention windows.

    `order` (N,) long lists the rows window by window, or is None where the rows already stand so;
    `cu_seqlens` (W+1,) int32 says where each window begins in that order, `lengths` the same on the host.
    """

    order: Tensor | None
    cu_seqlens: Tensor
    lengths: list[int]

    @cached_property
    def inverse(self) -> Tensor | None:
        """Rows of the ordered tokens in the original order (N,) long: `x[order][inverse] == x`."""
        return None if self.order is None else self.order.argsort()

    def map(self, move: Callable[[Tensor], Tensor]) -> "Windows":
        """The same with all tensors moved."""
        windows = Windows(self.order if self.order is None else move(self.order), move(self.cu_seqlens), self.lengths)
        if self.order is not None:
            windows.__dict__["inverse"] = move(self.inverse)  # where it is cached
        return windows
