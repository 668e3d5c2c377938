"""Picture -> the object cut out of its background -> the square picture on white that the encoder reads.

Nothing is downloaded: rembg runs only if it is installed and its model file is on this machine.
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..storage.one_line import one_line
from .alpha import clean_alpha, fill_transparent, tells_object
from .image_file import ImageError
from .plain_background import remove_plain_background

METHODS = ("auto", "alpha", "plain", "rembg")
SIZE, MARGIN = 518, 16  # pixels: edge of the picture that the encoder reads, and space around the object in it
LARGEST = 8192  # pixels: a longer object is made smaller before a square is made around it
MIN_FOREGROUND = 1e-3  # share of the pixels; what covers less is no object
REMBG_MODELS = ("birefnet-general", "isnet-general-use", "u2net", "u2netp", "silueta", "bria-rmbg")  # best first


def cut_out(
    image: Image.Image,
    mask: Image.Image | None = None,
    method: str = "auto",
    rembg_model: str | None = None,
    notify: Callable[[str], object] = logging.warning,
) -> Image.Image:
    """Give an image an alpha channel that covers only its object.

    A given mask decides. Else "auto" takes the first that works: the image's own alpha, if it leaves out more than the
    corners; a plain background; rembg. A faint haze and stray specks, which would make the object look small in its
    frame, are removed from alpha and masks.

    Args:
        image: RGB or RGBA.
        mask: as large as the image, mode L or 1, 255 on the object; it overrides `method`.
        method: "auto", "alpha", "plain" or "rembg".
        rembg_model: name of the rembg model to use; default: the best one whose file is on this machine.
        notify: called with one line for each decision that the user should know.

    Returns:
        An RGBA image of the same size. A plain background is also removed from the colours at soft edges.

    Raises:
        ImageError: the image is fully transparent, its object covers less than 0.1 % of the pixels, or there is no way
            to find it.
        ValueError: the method is unknown, or the mask is not as large as the image.
    """
    if method not in METHODS:
        raise ValueError(f"expected a method of {METHODS}, got {method!r}")
    if mask is not None:
        if mask.size != image.size:
            raise ValueError(f"expected a mask of the image's size {image.size}, got {mask.size}")
        cut = image.convert("RGB")
        cut.putalpha(mask.convert("L"))
        return _with_foreground(_cleaned(cut, notify), "the mask is empty")
    if method in ("auto", "alpha") and image.mode == "RGBA":
        if alpha_range(image)[1] == 0:
            raise ImageError("the image is fully transparent")
        if method == "alpha" or tells_object(image):
            return _with_foreground(_cleaned(image, notify), "the image is almost fully transparent")
    if method == "alpha":
        raise ImageError("the image has no alpha channel; give a mask, or remove the background another way")
    image = fill_transparent(image)
    if method in ("auto", "plain"):
        cut = remove_plain_background(image)
        if cut is not None:
            return _with_foreground(cut, "nothing stands out from the plain background")
        if method == "plain":
            raise ImageError("the background is not plain; give an image with transparency, a mask, or use rembg")
    reason = why_rembg_cannot_run(rembg_model)
    if reason is not None:
        before = "the background is not plain and " if method == "auto" else ""
        raise ImageError(f"{before}{reason}; or give an image with transparency, a plain background or a mask")
    return _with_foreground(_rembg(image, rembg_model), "rembg found nothing")


def _cleaned(image: Image.Image, notify: Callable[[str], object]) -> Image.Image:
    """Return an RGBA image without a haze and specks in its alpha, and say so if there were any."""
    cleaned, dropped = clean_alpha(image)
    if dropped:
        notify(f"left out of the object: {dropped} of {image.width * image.height} pixels, faint or far from it")
    return cleaned


def _with_foreground(cut: Image.Image, reason: str) -> Image.Image:
    """Return the image if its alpha covers enough pixels. Raises ImageError."""
    covered = np.count_nonzero(np.asarray(cut.getchannel("A"))) / (cut.width * cut.height)
    if covered < MIN_FOREGROUND:
        raise ImageError(f"no foreground in the image: {reason} (object {covered:.2%} of the pixels)")
    return cut


def _rembg(image: Image.Image, name: str | None) -> Image.Image:
    """Cut out the object with rembg, which can run, and the first of its model files that is on this machine."""
    from rembg import new_session, remove

    model, file = next((n, file) for n, file in _rembg_files(name).items() if file.is_file())
    try:
        return remove(image, session=new_session(model)).convert("RGBA")
    except Exception as error:  # onnxruntime has its own error class for each kind of failure
        raise ImageError(f"rembg failed with the model {file}: {one_line(error)}") from error


def alpha_range(image: Image.Image) -> tuple[int, int]:
    """Return the least and the greatest alpha of an RGBA image, 0 to 255."""
    alpha = np.asarray(image.getchannel("A"))
    return int(alpha.min()), int(alpha.max())


def missing_for_rembg() -> str | None:
    """Return which package rembg lacks, with advice; None if all are there. Nothing is imported."""
    if find_spec("rembg") is None:
        return 'rembg is not installed: pip install "rembg[cpu]"'
    if find_spec("onnxruntime") is None:  # importing rembg without it would end the whole process
        return "rembg cannot run, because onnxruntime is not installed: pip install onnxruntime"
    return None


def why_rembg_cannot_run(name: str | None = None) -> str | None:
    """Return why rembg cannot run without a download, with advice; None if it can.

    Args:
        name: the model that it is to run; default: any of REMBG_MODELS.

    Raises:
        ImageError: rembg has no model of this name.
    """
    missing = missing_for_rembg()
    if missing is not None:
        return missing
    files = _rembg_files(name)
    if any(file.is_file() for file in files.values()):
        return None
    return f"rembg has no model file such as {files[name or 'u2net']}, and nothing is downloaded: put one there"


def _rembg_files(name: str | None) -> dict[str, Path]:
    """Return where rembg keeps its models, best first, or the one of this name. Raises ImageError if it has none."""
    from rembg.sessions import sessions_class

    known = {session.name(): session for session in sessions_class}
    if name is not None and name not in known:
        raise ImageError(f"expected a rembg model of {sorted(known)}, got {name!r}")
    names = [n for n in REMBG_MODELS if n in known] if name is None else [name]
    return {n: _rembg_file(known[n], n) for n in names}


def _rembg_file(session: type, name: str) -> Path:
    """Return where rembg keeps a model: <home>/models/<name>/<name>.onnx, or <home>/<name>.onnx before 2.0.70."""
    file = f"{name}.onnx"
    if not hasattr(session, "model_dir"):
        return Path(session.u2net_home()) / file
    return Path(session.resolve_existing(file) or Path(session.model_dir()) / file)


def preprocess(image: Image.Image, size: int = SIZE, margin: float = MARGIN) -> Tensor:
    """Crop to the object, lay it on white and centre it in a square with a margin, as the released pipeline does.

    Args:
        image: RGBA, as `cut_out` returns it.
        size: pixels per edge.
        margin: pixels if size is `SIZE`, and in proportion at other sizes; training varies it.

    Returns:
        (4, size, size) float32 in [0, 1]: red, green, blue, mask.

    Raises:
        ValueError: the image is not RGBA.
    """
    if image.mode != "RGBA":
        raise ValueError(f"expected an RGBA image, got {image.mode}")
    image = image.crop(object_box(image))
    if max(image.size) > LARGEST:
        image = image.convert("RGBa").reduce(-(-max(image.size) // LARGEST)).convert("RGBA")
    samples = np.asarray(image)
    a = samples[..., 3] / 255.0
    # float64, this order of operations, and truncation: anything else differs by 1/255 in some pixels
    on_white = [((samples[..., channel] / 255.0 * a + (1 - a)) * 255).astype(np.uint8) for channel in range(3)]
    rgb = Image.fromarray(np.stack(on_white, axis=-1))
    mask = Image.fromarray((a * 255).astype(np.uint8))

    margin = round(margin * size / SIZE)
    rgb = _square(rgb, size, margin, "white", Image.Resampling.BILINEAR)
    mask = _square(mask, size, margin, "black", Image.Resampling.NEAREST)
    return torch.from_numpy(np.dstack([np.asarray(rgb), np.asarray(mask)])).permute(2, 0, 1).contiguous().float() / 255


def object_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Return the part of an RGBA image that `preprocess` keeps: left, top, right and bottom in pixels."""
    alpha = image.getchannel("A")
    seen = 1 - alpha.histogram()[0] / (image.width * image.height)
    box = alpha.getbbox() if seen >= MIN_FOREGROUND else None
    return box or (0, 0, image.width, image.height)


def centre_object(image: Image.Image, size: int, ratio: float) -> Image.Image:
    """Crop to the object and centre it in a transparent square.

    Args:
        image: RGBA, not fully transparent.
        size: pixels per edge of the square.
        ratio: longer side of the object / side of the square, in (0, 1].

    Returns:
        An RGBA image (size, size). Transparent pixels are black and do not tint the edge of the object.

    Raises:
        ValueError: the ratio is out of range.
        ImageError: the image is fully transparent.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"expected a ratio in (0, 1], got {ratio}")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ImageError("the image is fully transparent")
    cropped = image.crop(box)
    scale = size * ratio / max(cropped.size)
    width, height = (max(1, round(edge * scale)) for edge in cropped.size)
    resized = cropped.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (size, size))
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def _square(image: Image.Image, size: int, margin: int, color: str, resampling: Image.Resampling) -> Image.Image:
    """Pad to a square, resize to `size`, pad by the margin, resize to `size` again."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((size, size), resampling)
    return ImageOps.expand(square, margin, color).resize((size, size), resampling)
