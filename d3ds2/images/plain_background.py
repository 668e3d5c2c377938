"""Cut an object out of a plain background: the border of the picture shows one colour, or a soft gradient.

A smooth colour surface is fitted to the border. Pixels of its colour that connect to the border are background, so
parts of the object in the same colour stay. A cast shadow counts as part of the object, and so does background that
the object fully encloses. A line around the picture, and bars above and below or at both sides of it, are looked
through. The result is deterministic.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

WORKING_SIZE = 1024  # pixels of the longer side at which the mask is made; the encoder sees 518
MIN_BORDER_SHARE = 0.6  # share of the border that is background: the object may touch or cross one side
MAX_NOISE = 12.0  # of 255; more spread at the border means a scene, not a plain background
EDGE_PIXELS = 3  # width of the soft edge
MAX_FRAME = 0.04  # of the picture's shorter side: the width of a line around it
MAX_BAR = 0.4  # of the picture's height or width: that of one of two bars
ONE_COLOR = 24.0  # of 255: what differs by less is one colour
# rows: red, green, blue; columns: luma and, weighed less because JPEG smears them, the two chromas
LUMA_CHROMA = np.array([[0.299, -0.068, 0.2], [0.587, -0.132, -0.168], [0.114, 0.2, -0.032]], dtype=np.float32)


def remove_plain_background(image: Image.Image) -> Image.Image | None:
    """Give the object on a plain background an alpha channel.

    Args:
        image: RGB.

    Returns:
        An RGBA image of the same size, with the background removed from the colours at the soft edge; None if the
        border is not plain. Alpha is 0 everywhere if nothing stands out.
    """
    page = _page(np.asarray(image))
    if page is not None:
        inside = remove_plain_background(image.crop(page))
        if inside is not None and inside.getchannel("A").getbbox() is not None:
            cut = Image.new("RGBA", image.size)
            cut.paste(inside, page[:2])
            return cut
    scale = min(1.0, WORKING_SIZE / max(image.size))
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    small = image if scale == 1 else image.resize((width, height), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32)  # (H, W, 3), 0..255
    fitted = _fit_border(rgb)
    if fitted is None:
        return None
    background, noise = fitted
    distance = _difference(rgb, background)  # (H, W)
    alpha = _alpha(distance, threshold=3.0 + 4.0 * noise)
    if scale < 1:
        alpha = np.asarray(Image.fromarray(alpha).resize(image.size, Image.Resampling.BILINEAR))
        background = np.stack(
            [
                np.asarray(Image.fromarray(channel).resize(image.size, Image.Resampling.BILINEAR))
                for channel in np.moveaxis(background, -1, 0)
            ],
            axis=-1,
        )
    return _unmix(image, alpha, background)


def _page(rgb: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom of what a line or two bars frame in (H, W, 3); None if there is neither."""
    H, W = rgb.shape[:2]
    top, bottom, left, right = (
        _stripe(lines) for lines in (rgb, rgb[::-1], rgb.swapaxes(0, 1), rgb.swapaxes(0, 1)[::-1])
    )
    if all(0 < stripe <= MAX_FRAME * min(H, W) for stripe in (top, bottom, left, right)):
        return left, top, W - right, H - bottom
    if 0 < top <= MAX_BAR * H and 0 < bottom <= MAX_BAR * H:
        return 0, top, W, H - bottom
    if 0 < left <= MAX_BAR * W and 0 < right <= MAX_BAR * W:
        return left, 0, W - right, H
    return None


def _stripe(lines: np.ndarray) -> int:
    """Count the lines (n, m, 3), from the first one on, that have its colour all along, if another colour follows.

    0 if the first line has several colours, or if the next line has its colour anywhere but at the ends.
    """
    color = np.median(lines[0], axis=0)
    count = 0
    while count < len(lines) and _is_near(lines[count], color).all():
        count += 1
    if count in (0, len(lines)):
        return 0
    while count < len(lines) - 1 and not _is_near(lines[count], lines[count + 1]).mean() > 0.5:
        count += 1  # a line that mixes both colours
    ends = max(1, round(MAX_FRAME * lines.shape[1])) + 1
    return 0 if _is_near(lines[count], color)[ends:-ends].any() else count


def _is_near(line: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Whether the colours (m, 3) are one with the other, (3,) or (m, 3)."""
    return np.abs(line.astype(np.float32) - color).max(-1) < ONE_COLOR


def _fit_border(rgb: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Return the colour surface (H, W, 3) of the background and its noise (of 255); None if the border is not plain."""
    H, W = rgb.shape[:2]
    width = max(1, min(H, W) // 50)
    y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    is_border = np.ones((H, W), dtype=bool)
    is_border[width : H - width, width : W - width] = False
    colors, y_border, x_border = rgb[is_border].astype(np.float64), y[is_border], x[is_border]

    # start from the most common colour, then fit a plane and a paraboloid to the pixels that agree
    bins = (colors // 16).astype(np.int64) @ (1, 16, 256)
    center = np.median(colors[bins == np.bincount(bins).argmax()], axis=0)
    agrees = np.abs(colors - center).max(-1) < 24
    for degree in (0, 1, 1, 2, 2):
        terms = _polynomial(x_border, y_border, degree)
        if agrees.sum() < 10 * terms.shape[1]:
            terms = terms[:, :1]  # too few pixels for more than one colour
        coefficients = np.linalg.lstsq(terms[agrees], colors[agrees], rcond=None)[0]
        residual = _difference(colors, terms @ coefficients)
        noise = 1.4826 * float(np.median(residual[agrees]))
        agrees = residual < 6.0 + 4.0 * noise
        if not agrees.any():
            return None
    if agrees.mean() < MIN_BORDER_SHARE or noise > MAX_NOISE:
        return None
    fitted = _polynomial(x.ravel(), y.ravel(), degree)[:, : len(coefficients)] @ coefficients
    return fitted.reshape(H, W, 3).clip(0, 255).astype(np.float32), noise


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distance (...), of 255, between colours (..., 3)."""
    return np.sqrt(np.square((a - b) @ LUMA_CHROMA).sum(-1))


def _polynomial(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """Return the monomials of x and y (n,) up to the degree, (n, 1 | 3 | 6)."""
    return np.stack([x**i * y**j for n in range(degree + 1) for i in range(n + 1) for j in [n - i]], axis=-1)


def _alpha(distance: np.ndarray, threshold: float) -> np.ndarray:
    """Turn colour distances to the background (H, W) into alpha in [0, 1], float32."""
    # background: the pixels near its colour that connect to the border of the picture
    is_near = np.pad(distance < threshold, 1, constant_values=True)
    labels = ndimage.label(is_near)[0]
    is_object = (labels != labels[0, 0])[1:-1, 1:-1]

    labels, count = ndimage.label(is_object, structure=np.ones((3, 3)))
    if count == 0:
        return np.zeros(distance.shape, dtype=np.float32)
    areas = np.bincount(labels.ravel())[1:]
    is_speck = areas < max(2e-4 * distance.size, 5e-3 * areas.max())  # dust, noise and ringing
    is_object &= ~np.concatenate([[True], is_speck])[labels]

    # a pixel of the edge mixes object and background, so its distance is alpha times that of the object next to it
    inside = ndimage.distance_transform_cdt(np.pad(is_object, 1, constant_values=False), "chessboard")[1:-1, 1:-1]
    full = ndimage.maximum_filter(np.where(is_object, distance, 0), size=2 * EDGE_PIXELS + 1)
    mixed = (distance / np.maximum(full, 1e-6) - 0.1) / 0.8  # ringing stays below a tenth
    alpha = np.where(inside > EDGE_PIXELS, 1, mixed.clip(0, 1)) * is_object
    return alpha.astype(np.float32)


def _unmix(image: Image.Image, alpha: np.ndarray, background: np.ndarray) -> Image.Image:
    """Return the RGBA image which, laid over `background` (H, W, 3) with `alpha` (H, W), gives the image again."""
    rgb = np.array(image)
    soft = (alpha > 0) & (alpha < 1)
    a = np.maximum(alpha[soft], 0.05)[:, None]
    rgb[soft] = ((rgb[soft] - (1 - a) * background[soft]) / a).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, (alpha * 255).round().astype(np.uint8)]), "RGBA")
