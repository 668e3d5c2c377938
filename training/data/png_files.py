"""Pictures in PNG files, whose parts have checksums of their own. Imports no torch."""

import io
import zlib
from pathlib import Path

from PIL import Image

from d3ds2.storage.one_line import one_line
from training.data.array_files import DamagedFileError

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_png(path: Path) -> Image.Image:
    """Read a picture as RGBA.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is cut off, or differs from its checksums.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"missing file {path}") from None
    if not is_whole(content):
        raise DamagedFileError(f"damaged picture {path}")
    try:
        return Image.open(io.BytesIO(content)).convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise DamagedFileError(f"damaged picture {path} ({one_line(error)})") from None


def is_whole(content: bytes) -> bool:
    """Whether all chunks of a PNG file are there and match their checksums. Pillow does not look at those of pixels."""
    if not content.startswith(SIGNATURE):
        return False
    place = len(SIGNATURE)
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunk, after = content[place + 4 : place + 8 + length], place + 12 + length
        if after > len(content) or zlib.crc32(chunk) != int.from_bytes(content[after - 4 : after], "big"):
            return False
        if chunk[:4] == b"IEND":
            return after == len(content)
        place = after
    return False
