"""The alpha channel of pictures as people have them: with haze, stray pixels, or no information at all.

The object is cropped to the box of its alpha, so one stray pixel in a corner would make it small in its frame.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

FAINT = 0.1  # of the greatest alpha: less is haze
SPECK_SHARE = 5e-3  # of the largest part of the object: a smaller part is a speck
WIDER = 0.05  # of the object's longer side: what widens its box by no more on any side does no harm
EDGE, MIN_EDGE = 0.01, 3  # of that side, and pixels: around the object, faint alpha is its soft edge
OPAQUE = 250  # of 255
FULL_SHARE = 0.985  # of the pixels: alpha that covers more leaves out nothing but rounded corners


def tells_object(image: Image.Image) -> bool:
    """Whether the alpha of an RGBA image tells the object from its background: more than the corners is transparent."""
    return bool((np.asarray(image.getchannel("A")) >= OPAQUE).mean() < FULL_SHARE)


def clean_alpha(image: Image.Image) -> tuple[Image.Image, int]:
    """Remove haze and specks from the alpha of an RGBA image, if they widen the box of the object by more than WIDER.

    Returns:
        The image and the number of pixels that became transparent; the image as it was, and 0, if its box is right.
    """
    alpha = np.asarray(image.getchannel("A"))
    labels, count = ndimage.label(alpha > FAINT * alpha.max(), structure=np.ones((3, 3)))
    if count == 0:
        return image, 0
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    is_object = (areas >= SPECK_SHARE * areas.max())[labels] & (labels > 0)
    low, high = _box(is_object)
    size = int((high - low).max())
    widest = WIDER * size  # a soft edge may be wide
    low_of_all, high_of_all = _box(alpha > 0)
    if (low - low_of_all <= widest).all() and (high_of_all - high <= widest).all():
        return image, 0
    edge = max(MIN_EDGE, round(EDGE * size))
    left_out = (alpha > 0) & ~ndimage.maximum_filter(is_object, 2 * edge + 1)
    cleaned = image.copy()
    cleaned.putalpha(Image.fromarray(np.where(left_out, 0, alpha)))
    return cleaned, int(left_out.sum())


def fill_transparent(image: Image.Image) -> Image.Image:
    """Return an RGB image, its transparent parts in the median colour of the opaque pixels along the picture's border.

    A screenshot with rounded corners gets its corners back. An RGB image is returned unchanged.
    """
    if image.mode != "RGBA":
        return image.convert("RGB")
    samples = np.asarray(image)
    alpha = samples[..., 3]
    width = max(1, min(alpha.shape) // 50)
    border = np.ones(alpha.shape, dtype=bool)
    border[width:-width, width:-width] = False
    opaque = border & (alpha >= OPAQUE)
    colors = samples[opaque if opaque.any() else alpha > 0][:, :3]
    filled = Image.new("RGB", image.size, tuple(int(c) for c in np.median(colors, axis=0)))
    filled.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return filled


def _box(covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last row and column of what is covered (H, W), (2,) each."""
    lines = [np.flatnonzero(covered.any(axis)) for axis in (1, 0)]
    return np.array([line[0] for line in lines]), np.array([line[-1] for line in lines])
