"""Image file -> RGB or RGBA picture of 8 bits: all that Pillow reads, and HEIC where pillow-heif is installed."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..storage.one_line import OneLineError, one_line

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")  # bytes 8 to 12 of such a file
LONGEST_EDGE = 65535  # pixels


class ImageError(OneLineError):
    """An image that cannot be read, or shows no object that stands out from its background."""


def load_image(path: str | Path) -> Image.Image:
    """Read an image file of any kind that Pillow knows, or HEIC, and turn it upright as its EXIF data says.

    Returns:
        An 8-bit image, RGBA if the file has transparency, else RGB. Samples of 10 to 16 bits lose their low bits.

    Raises:
        ImageError: the file is missing, not an image, damaged, or has more pixels than Pillow reads (179 million) or an
            edge of more than 65,535.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ImageError(f"no such image: {path}")
        if not path.is_file():
            raise ImageError(f"expected an image file, got a folder: {path}")
        if _is_heic(path):
            _learn_heic(path)
        with warnings.catch_warnings():  # an image that is read is good enough; an error says what is wrong
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                if max(file.size) > LONGEST_EDGE:
                    size = " x ".join(map(str, file.size))
                    raise ImageError(f"expected edges of at most {LONGEST_EDGE:,} pixels, got {size}: {path}")
                file.load()
                image = ImageOps.exif_transpose(file)
            return _to_8_bit(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image that can be read: {path}") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ImageError(f"the image has too many pixels, expected at most {most} million: {path}") from None
    except MemoryError:
        raise ImageError(f"the image does not fit into memory: {path}") from None
    except OSError as error:
        if error.errno is not None:  # Pillow's own errors about the content have no errno
            raise ImageError(f"cannot read {path}: {error.strerror}") from None
        raise _damaged(path, error) from None
    except Exception as error:  # a strange file can make Pillow's readers fail in any way
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ImageError:
    return ImageError(f"the image is truncated or damaged: {path} ({one_line(error) or type(error).__name__})")


def _is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def _learn_heic(path: Path) -> None:
    """Let Pillow read HEIC. Raises ImageError if the package for it is missing."""
    if find_spec("pillow_heif") is None:
        raise ImageError(f"a HEIC image needs pillow-heif (pip install pillow-heif), or save it as JPEG or PNG: {path}")
    import pillow_heif

    pillow_heif.register_heif_opener()


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, or to RGBA if there is transparency."""
    if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit and float samples, always one channel
        samples = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
        image = Image.fromarray((samples / _white(samples, image.mode) * 255).clip(0, 255).astype(np.uint8))
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return image.convert("RGBA" if has_alpha else "RGB")


def _white(samples: np.ndarray, mode: str) -> float:
    """The value of white: 1 for floats up to 1, else the greatest number of 8, 10, 12, 14 or 16 bits that is needed."""
    most = samples.max(initial=0)
    if mode == "F" and most <= 1:
        return 1.0
    return next((2.0**bits - 1 for bits in (8, 10, 12, 14) if most < 2**bits), 65535.0)
