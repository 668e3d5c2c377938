"""Which items each step sees: a function of (seed, step)."""

import sys
from collections.abc import Iterator

import numpy as np

TRIES = 32  # items drawn to replace a damaged one, before all are tried in order


def draw(*key: int) -> np.random.Generator:
    """Return a random generator that follows from the key alone, such as (seed, step)."""
    return np.random.default_rng(key)


class BatchPlan:
    """The items of each step: one random permutation of all items after another, cut into batches.

    `tokens` (n,) are the sizes of n things, and item i is of thing i // copies. A batch ends at `batch_size` items, or
    before an item that would raise it above `max_tokens`. Larger items are left out; `kept` lists the others.

    Raises:
        ValueError: every item is larger than `max_tokens`.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, max_tokens: int, seed: int, copies: int = 1):
        self.tokens, self.batch_size, self.max_tokens, self.seed = tokens, batch_size, max_tokens, seed
        self.copies = copies
        fitting = np.flatnonzero(tokens <= max_tokens)
        if len(fitting) == 0:
            raise ValueError(f"expected items of at most {max_tokens} tokens, the smallest has {tokens.min()}")
        kept = fitting[:, None] * copies + np.arange(copies)
        self.kept = kept.reshape(-1).astype(np.int32 if kept[-1, -1] < 2**31 else np.int64)
        self._restart()

    def _restart(self) -> None:
        self._epoch, self._first_step = 0, 0
        self._order, self._starts = self.kept[:0], [0]  # of the epoch's batches; the last start ends the last batch

    def __getitem__(self, step: int) -> np.ndarray:
        """The items of a step, (number,) int64."""
        if step < self._first_step:
            self._restart()
        while step >= self._first_step + len(self._starts) - 1:
            self._first_step += len(self._starts) - 1  # forget the previous epoch: steps mostly go forward
            unfinished = self._order[self._starts[-1] :]  # the last batch is filled by the next epoch
            self._order = np.concatenate([unfinished, self._items(draw(self.seed, self._epoch))])
            self._starts = cut(self.sizes_of(self._order), self.batch_size, self.max_tokens)
            self._epoch += 1
        start, stop = self._starts[step - self._first_step : step - self._first_step + 2]
        return self._order[start:stop].astype(np.int64)

    def _items(self, rng: np.random.Generator) -> np.ndarray:
        """The items of an epoch, in the order in which they come."""
        return rng.permutation(self.kept)

    def sizes_of(self, items: np.ndarray) -> np.ndarray:
        """The tokens of items (number,): (number,) int64."""
        return self.tokens[items // self.copies]

    def sizes(self, step: int) -> np.ndarray:
        """The tokens of each item of a step, (number,) int64."""
        return self.sizes_of(self[step])

    def others(self, item: int, step: int) -> Iterator[int]:
        """Yield items of at most as many tokens, at random: to replace an item of a step whose file is damaged."""
        rng, sizes = draw(self.seed, step, 3, item), self.sizes_of(self.kept)
        yield from rng.choice(self.kept[sizes <= self.tokens[item // self.copies]], TRIES).tolist()
        yield from self.kept[sizes.argsort(kind="stable")].tolist()  # the smallest first


def cut(sizes: np.ndarray, batch_size: int, max_tokens: int) -> list[int]:
    """Cut items of these sizes (n,) into batches, the last of which may be unfinished. A larger one is a batch alone.

    Returns:
        The first item of each batch.
    """
    sums, first = np.concatenate([[0], np.cumsum(sizes)]), np.arange(len(sizes))
    # a batch that begins at an item ends before the first one that would be too much
    ends = np.minimum(np.searchsorted(sums, sums[:-1] + max_tokens, side="right") - 1, first + batch_size)
    ends = np.maximum(ends, first + 1)
    starts, end_of = [0], memoryview(ends)
    while len(sizes) and (end := end_of[starts[-1]]) < len(sizes):
        starts.append(end)
    return starts


class ResolutionPlan:
    """The resolution of each step, drawn uniformly, and the number of earlier steps with the same one."""

    CHUNK = 4096  # steps drawn at once

    def __init__(self, resolutions: tuple[int, ...], seed: int):
        self.resolutions, self.seed, self._drawn = resolutions, seed, np.zeros(0, dtype=np.int64)

    def __getitem__(self, step: int) -> tuple[int, int]:
        while step >= len(self._drawn):
            rng = draw(self.seed, len(self._drawn) // self.CHUNK, 1)
            self._drawn = np.concatenate([self._drawn, rng.integers(len(self.resolutions), size=self.CHUNK)])
        choice = self._drawn[step]
        return self.resolutions[choice], int((self._drawn[:step] == choice).sum())


def say_left_out(tokens: np.ndarray, max_tokens: int, what: str) -> None:
    """Say how many of these items have more tokens (n,) than a batch may have."""
    if count := int((tokens > max_tokens).sum()):
        print(
            f"{count} of {len(tokens)} {what} have more than {max_tokens} tokens (up to {tokens.max()}): left out",
            file=sys.stderr,
            flush=True,
        )


def plan_shapes(num_items: int, batch_size: int, seed: int, weights: np.ndarray | None = None) -> BatchPlan:
    """Plan batches of items of equal size; each comes once an epoch, or `weights` (num_items,) times on average."""
    if weights is not None:
        return WeightedPlan(weights, batch_size, seed)
    return BatchPlan(np.ones(num_items, dtype=np.int64), batch_size, batch_size, seed)


def plan_views(
    num_shapes: int, batch_size: int, views_per_shape: int, seed: int, weights: np.ndarray | None = None
) -> BatchPlan:
    """Plan batches of shapes and their mirror images, `2 * shape + mirrored`, several views of each side by side.

    `weights` (num_shapes,) say how often a shape is drawn, in proportion; None: all equally often.
    """
    weights = None if weights is None else weights.repeat(2)
    return plan_shapes(2 * num_shapes, shapes_per_batch(batch_size, views_per_shape), seed, weights)


class WeightedPlan(BatchPlan):
    """A plan of items of equal size, in which item i comes `weights[i]` times an epoch on average: weights (n,) >= 0.

    An item comes floor(weight) times or once more, drawn for each epoch. `kept` are the items of weight above 0.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    def __init__(self, weights: np.ndarray, batch_size: int, seed: int):
        if weights.min() < 0 or weights.max() == 0:
            raise ValueError(f"expected weights of at least 0, some above, got {weights.min()} to {weights.max()}")
        self.weights = weights
        super().__init__(np.ones(len(weights), dtype=np.int64), batch_size, batch_size, seed)
        self.kept = self.kept[weights > 0]

    def _items(self, rng: np.random.Generator) -> np.ndarray:
        times = np.floor(self.weights + rng.random(len(self.weights))).astype(np.int64)
        return rng.permutation(np.arange(len(times)).repeat(times))


def shapes_per_batch(batch_size: int, views_per_shape: int) -> int:
    """The number of different shapes in a batch.

    Raises:
        ValueError: `views_per_shape` does not divide the batch size.
    """
    if batch_size % views_per_shape:
        raise ValueError(f"expected a batch_size divisible by views_per_shape {views_per_shape}, got {batch_size}")
    return batch_size // views_per_shape
