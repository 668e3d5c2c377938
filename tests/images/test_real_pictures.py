"""Pictures as people have them: haze and stray pixels in the alpha, frames and bars, odd depths, HEIC."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw

from d3ds2.images.alpha import clean_alpha, tells_object
from d3ds2.images.foreground import cut_out
from d3ds2.images.image_file import ImageError, load_image

SIZE = 256
MASK = Image.new("L", (SIZE, SIZE))
ImageDraw.Draw(MASK).ellipse((64, 64, 192, 192), fill=255)
OBJECT = np.asarray(MASK) > 127


def on_white() -> Image.Image:
    """Draw a brown disc on white."""
    return Image.composite(Image.new("RGB", MASK.size, (150, 90, 40)), Image.new("RGB", MASK.size, "white"), MASK)


def with_alpha(alpha: np.ndarray) -> Image.Image:
    image = on_white()
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image


def assert_disc(cut: Image.Image, left: int = 0, top: int = 0) -> None:
    """Check that what was cut out is the disc, moved by `left` and `top`, and has its box."""
    found = np.asarray(cut.getchannel("A"))[top : top + SIZE, left : left + SIZE]
    assert ((found > 127) & OBJECT).sum() / ((found > 127) | OBJECT).sum() > 0.97
    box = cut.getchannel("A").point(lambda a: 255 * (a > 25)).getbbox()
    assert np.abs(np.subtract(box, (64 + left, 64 + top, 193 + left, 193 + top))).max() <= 3


def test_haze_is_left_out():
    alpha = np.maximum(np.asarray(MASK), np.random.default_rng(0).integers(0, 4, OBJECT.shape))
    lines = []
    assert_disc(cut_out(with_alpha(alpha), notify=lines.append))
    assert len(lines) == 1 and "left out of the object" in lines[0]


@pytest.mark.parametrize("at", [(2, 2), (250, 100)])
def test_a_stray_pixel_is_left_out(at):
    alpha = np.array(MASK)
    alpha[at] = 255
    lines = []
    assert_disc(cut_out(with_alpha(alpha), notify=lines.append))
    assert lines == ["left out of the object: 1 of 65536 pixels, faint or far from it"]
    assert_disc(cut_out(on_white(), Image.fromarray(alpha), notify=lines.append))  # in a mask, too


def test_parts_and_soft_edges_stay():
    alpha = np.array(MASK)
    alpha[10:30, 10:30] = 255  # 3 % of the disc
    soft = np.array(MASK.resize((64, 64)).resize(MASK.size, Image.Resampling.BICUBIC))
    for kept in (alpha, soft, np.asarray(MASK) // 20):  # the last is faint everywhere
        image = with_alpha(kept)
        assert clean_alpha(image) == (image, 0)


@pytest.mark.parametrize("alpha", ["254", "corners"])
def test_alpha_that_tells_nothing_is_passed_over(alpha):
    full = Image.new("L", MASK.size, 254)
    if alpha == "corners":
        full = Image.new("L", MASK.size)
        ImageDraw.Draw(full).rounded_rectangle((0, 0, SIZE - 1, SIZE - 1), 12, fill=255)
    image = on_white()
    image.putalpha(full)
    assert not tells_object(image)
    assert_disc(cut_out(image))
    assert cut_out(image, method="alpha").getchannel("A").tobytes() == full.tobytes()


@pytest.mark.parametrize("width", [1, 2, 6])
@pytest.mark.parametrize("color", ["black", (180, 30, 30)])
def test_a_line_around_the_picture_is_looked_through(width, color):
    image = on_white()
    ImageDraw.Draw(image).rectangle((0, 0, SIZE - 1, SIZE - 1), outline=color, width=width)
    assert_disc(cut_out(image))


@pytest.mark.parametrize("size", [(SIZE, 400), (500, SIZE)])
def test_bars_are_looked_through(size):
    image = Image.new("RGB", size, "black")
    left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    image.paste(on_white(), (left, top))
    assert_disc(cut_out(image), left, top)


def test_a_wide_object_is_no_bar():
    """A shelf that crosses the picture from side to side is the object, not a page between two bars."""
    image = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(image).rectangle((0, 60, 199, 100), fill=(120, 80, 40))
    alpha = np.asarray(cut_out(image).getchannel("A"))
    assert (alpha[65:95] == 255).all() and alpha[:55].max() == 0 and alpha[106:].max() == 0


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_greys_of_any_depth(tmp_path, bits):
    values = np.asarray(on_white().convert("L"), np.float64) / 255 * (2**bits - 1)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    loaded = np.asarray(load_image(tmp_path / "deep.png").convert("L"), int)
    assert np.abs(loaded - values * 255 // (2**bits - 1)).max() <= 1


def test_not_a_number_in_a_tiff_is_black(tmp_path):
    values = np.full((40, 40), 0.5, np.float32)
    values[3] = np.nan
    Image.fromarray(values).save(tmp_path / "f.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = np.asarray(load_image(tmp_path / "f.tif"))
    assert (loaded[3] == 0).all() and (loaded[4:] == 127).all()


def test_heic(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(on_white()).save(tmp_path / "photo.heic", quality=95)
    assert_disc(cut_out(load_image(tmp_path / "photo.heic")))
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "photo.heic").read_bytes())  # as some phones name it
    assert_disc(cut_out(load_image(tmp_path / "photo.jpg")))
    monkeypatch.setattr("d3ds2.images.image_file.find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"needs pillow-heif \(pip install pillow-heif\).*photo\.heic"):
        load_image(tmp_path / "photo.heic")


@pytest.mark.parametrize("error", [NotImplementedError("flags"), ZeroDivisionError(), MemoryError(), KeyError(3)])
def test_any_error_of_a_reader_is_one_line(tmp_path, monkeypatch, error):
    on_white().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(ImageError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_a_long_name_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ImageError, match="File name too long"):
        load_image(tmp_path / ("a" * 300 + ".png"))
