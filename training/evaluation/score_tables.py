"""Scores of many items -> means with 95 % confidence intervals, and tables of them in markdown."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 4000  # of the bootstrap


class Column(NamedTuple):
    """A column of a table: which score it shows, and how."""

    score: str
    scale: float = 1
    digits: int = 3
    higher_is_better: bool = True


def confidence_interval(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Estimate the 95 % interval of the mean by the percentile bootstrap; NaN where there is no value."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize(values: ArrayLike) -> dict[str, float | list[float]]:
    """Return {"mean", "median", "interval": [low, high], "count"} of the values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return {"mean": float("nan"), "median": float("nan"), "interval": [float("nan")] * 2, "count": 0}
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "interval": list(confidence_interval(values)),
        "count": len(values),
    }


def win_rate(ours: ArrayLike, theirs: ArrayLike, higher_is_better: bool = True) -> float:
    """The share of the items on which ours is better; a tie counts half.

    Raises:
        ValueError: no scores, or not as many of theirs as of ours.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if len(ours) != len(theirs) or len(ours) == 0:
        raise ValueError(
            f"expected equally many scores of ours and theirs, at least one, got {len(ours)} and {len(theirs)}"
        )
    better = ours > theirs if higher_is_better else ours < theirs
    return float(better.mean() + 0.5 * (ours == theirs).mean())


def format_summary(summary: dict, scale: float = 1.0, digits: int = 3) -> str:
    """Write a summary as `0.512 [0.490, 0.533]`: mean and interval; as a dash where nothing was measured."""
    if summary["count"] == 0:
        return "–"
    low, high = (bound * scale for bound in summary["interval"])
    return f"{summary['mean'] * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a pipe table; the first column is left-aligned, the others right-aligned.

    Raises:
        ValueError: a row is not as long as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"expected {len(header)} cells in each row, got {list(row)}")
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"
