"""The ranges from which cameras and lights of training pictures are drawn. Imports no torch."""

import dataclasses
from typing import Any

RANGE = tuple[float, float]  # the least and the largest value of a random draw
GAMMA = 2.2  # of sRGB, nearly: the linear gain of a relative change


def check_view_ranges(config: Any, prefix: str = "") -> None:
    """Check the fields of a config that are ranges, and its `light_tint`.

    Args:
        prefix: stands before the keys in messages, such as "rendered.".

    Raises:
        ValueError: a range has its larger value first, or the tint is outside [0, 1).
    """
    for field in dataclasses.fields(config):
        if field.type == RANGE:
            low, high = getattr(config, field.name)
            if not low <= high:
                raise ValueError(f"expected {prefix}{field.name} as [low, high], got {[low, high]}")
    if not 0 <= config.light_tint < 1:
        raise ValueError(f"expected {prefix}light_tint in [0, 1), got {config.light_tint}")
