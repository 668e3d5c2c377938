"""Attention windows: which tokens attend to each other.

N  voxels, all samples packed      W  occupied attention windows
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .per_grid import per_grid_property


@dataclass(frozen=True, eq=False)
class Windows:
    """A partition of the voxels into attention windows.

    Args:
        order: (N,) long, the rows window by window; None if they stand in that order already.
        cu_seqlens: (W+1,) int32, where each window begins in that order and, last, N.
        lengths: tokens of each window, on the host.
        tables: see `per_grid`.
    """

    order: Tensor | None
    cu_seqlens: Tensor
    lengths: list[int]
    tables: dict = field(default_factory=dict, repr=False)

    @per_grid_property
    def inverse(self) -> Tensor | None:
        """Row of each token in the order of windows, (N,) long: `x[order][inverse] == x`. None without `order`."""
        return None if self.order is None else self.order.argsort()

    def map(self, move: Callable[[Tensor], Tensor]) -> "Windows":
        """Return the same windows with all tensors moved, `inverse` among them."""
        if self.order is None:
            return Windows(None, move(self.cu_seqlens), self.lengths)
        tables = {Windows.inverse.key(): move(self.inverse)}
        return Windows(move(self.order), move(self.cu_seqlens), self.lengths, tables)
