"""Parts of a batch: the batch of a step is cut into ranks × `run.accumulate` parts with about equal numbers of tokens.

The cut follows from the batch and the number of parts alone. Random numbers are drawn for the whole batch, and a part
takes its rows. So the parts of a batch, computed by any number of ranks, are the same samples with the same noise as
the whole batch. The gradients differ by rounding alone if each part's means are weighted by its share of the values.

Sizes: B samples and M tokens of the whole batch; b and m of a part.
"""

import heapq
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.data.latent_views import ChosenLatents, LatentBatch
from training.data.loading import load_batches
from training.data.shape_batches import ShapeBatch
from training.distributed import Ranks
from training.run import RunConfig


class Cut(NamedTuple):
    """Where the samples and tokens of a part stand in the whole batch."""

    samples: Tensor  # (b,) int64
    num_samples: int  # B
    tokens: Tensor  # (m,) int64
    num_tokens: int  # M


class Part(NamedTuple):
    """The batch of a step, or a part of it.

    Attributes:
        batch: what the dataset returns for these samples; None if there are none.
        cut: None for a whole batch in which no smaller shape stands for a damaged one.
        shares: the share of the whole batch's values that this part has, each a scalar float32, by the name of what is
            counted; None for a whole batch.
        is_stand_in: whether the samples are also those of another part, so that this one counts for nothing.
    """

    batch: Any = None
    cut: Cut | None = None
    shares: dict[str, Tensor] | None = None
    is_stand_in: bool = False

    def own(self, number: int) -> int:
        """Return a number of this part, such as that of its tokens, for a sum over all parts."""
        return 0 if self.is_stand_in else number

    def draw_samples(self, number: int, make: Callable[[int], Tensor]) -> Tensor:
        """Return `make(number)`, whose rows are samples: (b, ...). A part takes its rows of the whole `make(B)`."""
        return make(number) if self.cut is None else _rows(make(self.cut.num_samples), self.cut.samples)

    def draw_tokens(self, number: int, make: Callable[[int], Tensor]) -> Tensor:
        """Return `make(number)`, whose rows are tokens: (m, ...). A part takes its rows of the whole `make(M)`."""
        return make(number) if self.cut is None else _rows(make(self.cut.num_tokens), self.cut.tokens)

    def weigh(self, counted: str, mean: Tensor) -> Tensor:
        """Multiply a mean over this part, of any shape, by its share of what is counted."""
        return mean if self.shares is None else self.shares[counted] * mean


WHOLE = Part()


def _rows(whole: Tensor, rows: Tensor) -> Tensor:
    return whole.to(rows.device).index_select(0, rows)  # the generator may be on the CPU


def split(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Deal samples of these sizes (B,) to parts: the largest first, each to the part with the smallest sum.

    Returns:
        The samples of each part, (b,) int64 in rising order.
    """
    heap = [(0, 0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for sample in np.argsort(-sizes, kind="stable").tolist():
        total, number, part = heapq.heappop(heap)
        dealt[part].append(sample)
        heapq.heappush(heap, (total + int(sizes[sample]), number + 1, part))
    return [np.array(sorted(samples), dtype=np.int64) for samples in dealt]


class Steps(Protocol):
    """A dataset whose batches can be cut."""

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each sample of a step, (B,) int64."""
        ...

    def load(self, step: int, chosen: np.ndarray) -> Any:
        """The batch of the chosen samples (b,) of a step."""
        ...

    def has_damage(self) -> bool:
        """Whether files are known to be damaged, so that other shapes stand for theirs."""
        ...


class Parts(Dataset):
    """The parts of one rank: item `step · accumulate + i` is its part i of a step.

    Where there are fewer samples than parts, some parts are empty, or stand-ins if `run.sharded`: the smallest sample.

    Raises:
        ValueError: a shape has more tokens than the index says.
    """

    def __init__(self, steps: Steps, ranks: Ranks, accumulate: int, stand_ins: bool = False):
        self.steps, self.accumulate, self.stand_ins = steps, accumulate, stand_ins
        self.first, self.number = ranks.rank * accumulate, ranks.size * accumulate

    def __getitem__(self, item: int) -> Part:
        step, part = divmod(item, self.accumulate)
        sizes = self.steps.sizes(step)
        chosen = split(sizes, self.number)[self.first + part]
        is_empty = len(chosen) == 0
        if is_empty and not self.stand_ins:
            return Part()
        chosen = np.argsort(sizes, kind="stable")[:1] if is_empty else chosen
        batch = self.steps.load(step, chosen)
        loaded = _sizes_of(batch)
        loaded = sizes[chosen] if loaded is None else np.array(loaded)
        too_large = np.flatnonzero(loaded > sizes[chosen]).tolist()
        if too_large and not self.steps.has_damage():
            sample = chosen[too_large[0]]
            raise ValueError(
                f"sample {sample} of step {step} has {loaded[too_large[0]]} tokens, but the index says "
                f"{sizes[sample]}: prepare the data again"
            )
        if self.number == 1 and (loaded == sizes).all():
            return Part(batch)
        # A smaller shape may stand for one that cannot be read: its rows are the first of those of the other. Where no
        # smaller one can be read, a larger one repeats them.
        spans = zip((np.cumsum(sizes) - sizes)[chosen], sizes[chosen], loaded, strict=True)
        rows = np.concatenate([start + np.arange(number) % planned for start, planned, number in spans])
        cut = Cut(torch.from_numpy(chosen), len(sizes), torch.from_numpy(rows), int(sizes.sum()))
        return Part(batch, cut, is_stand_in=is_empty)


def _sizes_of(batch: Any) -> list[int] | None:
    """The tokens of each sample in a packed batch, (b,); None for a dense one."""
    if isinstance(batch, ShapeBatch):
        return batch.latent_voxels.counts
    if isinstance(batch, (LatentBatch, ChosenLatents)):
        return torch.bincount(batch.coords[:, 0], minlength=batch.batch_size).tolist()
    return None


def load_parts(
    steps: Steps,
    first_step: int,
    run: RunConfig,
    ranks: Ranks,
    counted: tuple[str, ...],
    count: Callable[[Any], Tensor],
) -> Iterator[list[Part]]:
    """Yield, for each step from `first_step` on, the parts that this rank computes; an empty part is left out.

    Args:
        counted: names of the K things over which the loss takes means, such as "tokens".
        count: returns how many of each a batch has, (K,) int64. It is not called for a whole batch.
    """
    items = first_step * run.accumulate, run.steps * run.accumulate
    loaded = load_batches(Parts(steps, ranks, run.accumulate, run.sharded), *items, run.workers, ranks.device)
    if ranks.size * run.accumulate == 1:
        for part in loaded:
            yield [part]
        return
    while own := list(islice(loaded, run.accumulate)):
        own = [part for part in own if part.batch is not None]
        counts = [count(part.batch).to(ranks.device) * (not part.is_stand_in) for part in own]
        nothing = torch.zeros(len(counted), dtype=torch.int64, device=ranks.device)
        total = ranks.sum(sum(counts, start=nothing)).clamp(min=1)
        shares = [dict(zip(counted, (counts_ / total).float().unbind(), strict=True)) for counts_ in counts]
        yield [part._replace(shares=share) for part, share in zip(own, shares, strict=True)]
