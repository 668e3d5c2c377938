"""Convert between sRGB bytes and linear values in [0, 1], by tables."""

import numpy as np

_LEVELS = np.arange(4096) / 4095
_ENCODE = np.where(_LEVELS <= 0.0031308, 12.92 * _LEVELS, 1.055 * np.maximum(_LEVELS, 1e-9) ** (1 / 2.4) - 0.055)
_ENCODE = np.round(_ENCODE * 255).astype(np.uint8)
_BYTES = np.arange(256) / 255
_DECODE = np.where(_BYTES <= 0.04045, _BYTES / 12.92, ((_BYTES + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_bytes(linear: np.ndarray) -> np.ndarray:
    """Return the sRGB bytes of linear values in [0, 1], of any shape."""
    return _ENCODE[(linear * 4095 + 0.5).astype(np.int32)]


def to_linear(values: np.ndarray) -> np.ndarray:
    """Return the linear values, float32, of sRGB bytes (uint8) of any shape."""
    return _DECODE[values]
