"""Scores of many items -> means with 95 % confidence intervals, and tables of them in markdown."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000


def confidence_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap; NaN where there is no value."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize(values: Sequence[float]) -> dict[str, float | list[float]]:
    """{"mean", "median", "interval": [low, high], "count"} of the values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return {"mean": float("nan"), "median": float("nan"), "interval": [float("nan")] * 2, "count": 0}
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "interval": list(confidence_interval(values)),
        "count": len(values),
    }


def win_rate(ours: Sequence[float], theirs: Sequence[float], higher_is_better: bool = True) -> float:
    """Part of the items on which we are better; a tie counts half."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if len(ours) != len(theirs) or len(ours) == 0:
        raise ValueError(f"expected as many scores of ours as of theirs, at least one, got {len(ours)}, {len(theirs)}")
    better = ours > theirs if higher_is_better else ours < theirs
    return float(better.mean() + 0.5 * (ours == theirs).mean())


def format_summary(summary: dict, scale: float = 1.0, digits: int = 3) -> str:
    """`0.512 [0.490, 0.533]`; a dash where nothing was measured."""
    if summary["count"] == 0:
        return "–"
    low, high = (bound * scale for bound in summary["interval"])
    return f"{summary['mean'] * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table, its first column left-aligned and the others right-aligned.

    Raises:
        ValueError: a row of another length than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"expected {len(header)} cells in each row, got {list(row)}")
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, rule, *rows)) + "\n"
