"""Any image file ends in a picture or in one clear error."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d3ds2.images.foreground import cut_out, preprocess
from d3ds2.images.image_file import ImageError, load_image
from tests.support.bounded import outcome
from tests.support.hostile import damaged
from tests.support.tiny_model import draw_object

FORMATS = (
    ("PNG", "RGBA"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "L"), ("PNG", "1"), ("PNG", "I;16"), ("JPEG", "RGB"),
    ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("BMP", "1"), ("TIFF", "RGBA"), ("TIFF", "F"), ("TIFF", "I"),
    ("TIFF", "CMYK"), ("WEBP", "RGBA"), ("TGA", "RGBA"), ("PPM", "RGB"), ("ICO", "RGBA"), ("DDS", "RGBA"),
    ("PCX", "RGB"), ("SGI", "RGB"), ("ICNS", "RGBA"), ("JPEG2000", "RGB"), ("IM", "RGB"), ("SPIDER", "F"),
    ("MPO", "RGB"), ("QOI", "RGB"), ("AVIF", "RGBA"),
)  # fmt: skip
EXTENSIONS = ("png", "jpg", "gif", "bmp", "tif", "webp", "tga", "dds", "emf", "psd", "ico", "heic", "eps", "fits", "")


def encode(kind: str, mode: str) -> bytes:
    """Return the object in a format of Pillow's, or nothing where this Pillow cannot write it."""
    picture, file = draw_object(), io.BytesIO()
    if mode in ("F", "I", "I;16"):
        values = np.asarray(picture.convert("L"), np.float32)
        picture = Image.fromarray(values.astype({"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]))
    else:
        picture = picture.convert("RGB").convert(mode) if mode in ("P", "CMYK", "1") else picture.convert(mode)
    try:
        picture.save(file, kind)
    except (KeyError, OSError, ValueError):
        return b""
    return file.getvalue()


ENCODED = {form: data for form in FORMATS if (data := encode(*form))}


def emf(bounds=(0, 0, 100, 100), frame=(0, 0, 2540, 2540)) -> bytes:
    return struct.pack("<II4i4iIIIIHH", 1, 108, *bounds, *frame, 0x464D4520, 0x10000, 108, 1, 1, 0) + bytes(60)


def dds(flags: int, fourcc: bytes, width: int, height: int) -> bytes:
    header = struct.pack("<7I44x", 124, 0x1007, height, width, 0, 0, 0)
    return b"DDS " + header + struct.pack("<2I4s5I", 32, flags, fourcc, 32, 255, 255, 255, 255) + bytes(300)


def png(width: int, height: int, rows: bytes, more: bytes = b"") -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


NUMBERS = st.sampled_from((0, 1, 4, 64, 65535, 2**31 - 1, 2**32 - 1))
ROWS = st.sampled_from((b"", zlib.compress(bytes(100)), zlib.compress(bytes(10**6))))
STARTS = (b"BM", b"8BPS", b"%!PS-Adobe", b"SIMPLE  =", b"RIFF\x04\0\0\0WEBP", b"\0\0\0\x18ftypheic")
MADE = st.one_of(
    st.builds(dds, NUMBERS, st.sampled_from((b"DXT1", b"DX10", b"ATI2", b"\0\0\0\0", b"BC6H")), NUMBERS, NUMBERS),
    st.builds(emf, st.tuples(*[st.sampled_from((0, -1, 100, 2**31 - 1))] * 4)),
    st.builds(png, NUMBERS, NUMBERS, ROWS),
    st.builds(lambda start, rest: start + rest, st.sampled_from(STARTS), st.binary(max_size=200)),
    st.binary(max_size=300),
)
FILES = st.one_of(st.sampled_from(sorted(ENCODED)).flatmap(lambda form: damaged(ENCODED[form])), MADE)


@given(data=FILES, extension=st.sampled_from(EXTENSIONS))
def test_any_file_is_a_picture_or_one_error(tmp_path_factory, data, extension):
    path = tmp_path_factory.getbasetemp() / f"case.{extension}"
    path.write_bytes(data)
    image = outcome(lambda: load_image(path), ImageError)
    if isinstance(image, ImageError):
        assert str(path) in str(image)
        return
    assert image.mode in ("RGB", "RGBA") and min(image.size) > 0
    cut = outcome(lambda: cut_out(image, notify=lambda line: None), ImageError)
    if not isinstance(cut, ImageError):
        assert cut.mode == "RGBA" and cut.size == image.size
        pixels = outcome(lambda: preprocess(cut, 56))
        assert pixels.shape == (4, 56, 56) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize("form", sorted(ENCODED))
def test_whole_files_are_read(tmp_path, form):
    (tmp_path / "a").write_bytes(ENCODED[form])
    image = outcome(lambda: load_image(tmp_path / "a"))
    wanted = Image.open(io.BytesIO(ENCODED[form]))
    assert image.size == wanted.size
    if form in (("PNG", "RGBA"), ("TIFF", "RGBA"), ("TGA", "RGBA")):
        assert np.array_equal(np.asarray(image), np.asarray(draw_object()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(20_000_000, 1, zlib.compress(bytes(20_000_001))), "at most 65,535 pixels, got 20000000 x 1"),
        (png(1, 70_000, zlib.compress(bytes(140_000))), "got 1 x 70000"),
        (png(60_000, 60_000, zlib.compress(bytes(100))), "too many pixels, expected at most 178 million"),
        (dds(0x40, b"????", 64, 64), "(truncated or damaged|not an image)"),
        (dds(0xFFFFFFFF, b"DX10", 64, 64), "(truncated or damaged|not an image)"),
        (emf(), "(truncated or damaged|not an image)"),
        (emf((0, 0, 100, 100), (0, 0, 0, 0)), "(truncated or damaged|not an image)"),  # divides by the frame's size
        (ENCODED[("PNG", "RGBA")][:200], "truncated or damaged"),
        (b"", "not an image that can be read"),
    ],
)
def test_faults_that_were_found_are_one_line(tmp_path, data, message):
    (tmp_path / "a.png").write_bytes(data)
    error = outcome(lambda: load_image(tmp_path / "a.png"), ImageError)
    assert isinstance(error, ImageError) and re.search(message, str(error)), error


def test_a_long_object_is_made_smaller_first():
    image = Image.new("RGBA", (9_000, 900), (250, 0, 0, 255))
    pixels = outcome(lambda: preprocess(image, 56))
    assert pixels.shape == (4, 56, 56) and pixels[3].sum() > 20
