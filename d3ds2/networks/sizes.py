"""The limits of the numbers in a network's config: beyond them, building the network would take hours or all memory.

A config.json may come from anywhere. Within these limits a network takes little on the device "meta"; its weights are
made only after its shapes were compared with those in the file.
"""

import math
from dataclasses import fields
from typing import Any

MOST = 1 << 16  # of any size that has no limit of its own
MOST_LAYERS = 256
MOST_LEVELS = 8  # of widths
LIMITS = {  # by field: the least and the greatest value
    **dict.fromkeys(("depth", "encoder_depth", "decoder_depth", "layers"), (1, MOST_LAYERS)),
    **{f"{part}_{kind}_blocks": (0, MOST_LAYERS) for part in ("encoder", "decoder") for kind in ("res", "middle")},
    "middle_layers": (0, MOST_LAYERS),
    "num_registers": (0, 1024),
    "packing_channels": (0, MOST),
    "surplus_value": (0, 100),
    "mlp_ratio": (1, 64),
    "image_size": (1, 4096),  # pixels
    "patch_size": (1, 512),  # pixels or voxels
    "resolution": (1, 64),  # voxels of the structure's latents
}


def check_sizes(config: Any) -> None:
    """Check the numbers of a config dataclass, also those in its tuples.

    Raises:
        ValueError: a number is not finite, a size is out of its range, or a tuple is too long.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple) and len(value) > MOST_LEVELS:
            raise ValueError(f"expected at most {MOST_LEVELS} {field.name}, got {len(value)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"expected a finite {field.name}, got {number}")
            if type(number) is int or field.name in LIMITS:
                least, most = LIMITS.get(field.name, (1, MOST))
                if not least <= number <= most:
                    raise ValueError(f"expected {field.name} from {least} to {most}, got {number}")
