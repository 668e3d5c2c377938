"""Image files of every kind are read, the object is found, and errors say what cannot be used."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from d3ds2.images import foreground
from d3ds2.images.foreground import centre_object, cut_out, preprocess, why_rembg_cannot_run
from d3ds2.images.image_file import ImageError, load_image
from d3ds2.images.plain_background import remove_plain_background

ROOT = Path(__file__).resolve().parents[2]
SIZE = (160, 120)
MASK = Image.new("L", SIZE)
ImageDraw.Draw(MASK).ellipse((40, 20, 120, 110), fill=255)
ImageDraw.Draw(MASK).rectangle((70, 10, 90, 60), fill=255)


def background(kind: str) -> np.ndarray:
    """Return a picture (120, 160, 3) uint8."""
    w, h = SIZE
    y, x = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    rng = np.random.default_rng(0)
    colors = {
        "white": np.full((h, w, 3), 255.0),
        "black": np.zeros((h, w, 3)),
        "blue": np.full((h, w, 3), 1.0) * (30, 60, 200),
        "graded": (120 + 90 * y + 20 * x)[..., None] * (1, 1, 0.9),
        "vignette": (230 - 80 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))[..., None] * (1, 1, 1),
        "noisy": 170 + rng.normal(0, 5, (h, w, 3)),
        "scene": rng.integers(0, 120, (h // 8, w // 8, 3)).repeat(8, 0).repeat(8, 1).astype(float),
    }[kind]
    return colors.clip(0, 255).astype(np.uint8)


def picture(kind: str = "white", color=(220, 150, 40)) -> Image.Image:
    """Draw an object of one colour with a stripe of another on a background."""
    thing = Image.new("RGB", SIZE, color)
    ImageDraw.Draw(thing).rectangle((0, 50, SIZE[0], 65), fill=(150, 20, 60))
    return Image.composite(thing, Image.fromarray(background(kind)), MASK)


def overlap(cut: Image.Image) -> float:
    """Return the intersection over union of the alpha and the true mask."""
    found, true = np.asarray(cut.getchannel("A")) > 127, np.asarray(MASK) > 127
    return (found & true).sum() / (found | true).sum()


# --- reading


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("rgb.png", "RGB"),
        ("rgb.jpg", "RGB"),
        ("rgb.webp", "RGB"),
        ("rgb.bmp", "RGB"),
        ("gray.png", "L"),
        ("gray.jpg", "L"),
        ("bits.png", "1"),
        ("palette.png", "P"),
        ("palette.gif", "P"),
        ("cmyk.jpg", "CMYK"),
        ("cmyk.tif", "CMYK"),
        ("gray_alpha.png", "LA"),
        ("rgba.png", "RGBA"),
    ],
)
def test_modes_are_read_as_the_same_picture(tmp_path, name, mode):
    original = picture().convert("RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        original.putalpha(MASK)
    original.save(tmp_path / name)
    loaded = load_image(tmp_path / name)
    assert loaded.mode == ("RGBA" if mode in ("RGBA", "LA") else "RGB")
    expected = np.asarray(original.convert("RGB"), dtype=int)
    difference = np.abs(np.asarray(loaded.convert("RGB"), dtype=int) - expected)
    assert difference.mean() < (6 if name.endswith(("jpg", "webp", "gif")) else 0.01)
    if loaded.mode == "RGBA":
        assert np.array_equal(np.asarray(loaded.getchannel("A")), np.asarray(MASK))


def test_palette_with_a_transparent_color(tmp_path):
    paletted = picture().convert("P")
    paletted.info["transparency"] = paletted.getpixel((0, 0))
    paletted.save(tmp_path / "p.png", transparency=paletted.getpixel((0, 0)))
    loaded = load_image(tmp_path / "p.png")
    assert loaded.mode == "RGBA" and overlap(loaded) > 0.99


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_gray_keeps_its_high_byte(tmp_path, name):
    ramp = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / name)
    loaded = np.asarray(load_image(tmp_path / name), dtype=int)
    assert loaded.shape == (SIZE[1], SIZE[0], 3)
    assert np.abs(loaded[..., 0] - ramp / 257).max() <= 1


def test_16_bit_rgb_png(tmp_path):
    """Pillow cannot write this kind of PNG, so its chunks are written here."""
    import struct
    import zlib

    samples = np.asarray(picture(), dtype=np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png")), np.asarray(picture()))


def test_float_tiff(tmp_path):
    values = np.linspace(0, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE[1], SIZE[0])
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert np.abs(np.asarray(load_image(tmp_path / "f.tif"))[..., 0] - values * 255).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned; show it rotated by 90 degrees clockwise
    picture().save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        np.asarray(load_image(tmp_path / "turned.png")), np.asarray(picture().rotate(-90, expand=True))
    )


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.gif", "a.bmp"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_named(tmp_path, name, share):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"truncated or damaged|not an image") as raised:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(tmp_path / "a.png")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(ImageError, match=r"cannot read .*a\.png: Permission denied"):
        load_image(tmp_path / "a.png")


# --- finding the object


def test_a_given_mask_is_used():
    cut = cut_out(picture("scene"), MASK)
    assert np.array_equal(np.asarray(cut.getchannel("A")), np.asarray(MASK))
    with pytest.raises(ImageError, match="the mask is empty"):
        cut_out(picture(), Image.new("L", SIZE))
    with pytest.raises(ValueError, match="expected a mask of the image's size"):
        cut_out(picture(), MASK.resize((10, 10)))


def test_alpha_is_kept_as_it_is():
    image = picture()
    image.putalpha(MASK.point(lambda v: v // 2))
    assert cut_out(image).tobytes() == image.tobytes()


def test_opaque_alpha_is_no_alpha():
    image = picture("white").convert("RGBA")
    assert overlap(cut_out(image)) > 0.97
    assert cut_out(image, method="alpha").tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["white", "black", "blue", "graded", "vignette", "noisy"])
@pytest.mark.parametrize("quality", [None, 75])
def test_plain_backgrounds_are_removed(tmp_path, kind, quality):
    image = picture(kind)
    if quality:
        image.save(tmp_path / "a.jpg", quality=quality)
        image = load_image(tmp_path / "a.jpg")
    assert overlap(cut_out(image)) > (0.88 if quality else 0.97)


def test_plain_background_is_deterministic():
    assert remove_plain_background(picture("noisy")).tobytes() == remove_plain_background(picture("noisy")).tobytes()


def test_inside_of_the_background_color_stays():
    image = picture("white")
    ImageDraw.Draw(image).ellipse((70, 70, 90, 95), fill="white")
    assert overlap(cut_out(image)) > 0.97


def test_an_object_may_leave_the_picture():
    image = Image.new("RGB", (100, 100), (240, 240, 240))
    ImageDraw.Draw(image).rectangle((30, 40, 70, 99), fill=(90, 40, 20))
    alpha = np.asarray(cut_out(image).getchannel("A"))
    assert (alpha[45:, 35:66] == 255).all() and alpha[:, :25].max() == 0 and alpha[:35].max() == 0


def test_soft_edges_are_freed_of_the_background():
    """A blurred disc keeps its colour up to the rim on every background."""
    large = Image.new("L", (800, 800))
    ImageDraw.Draw(large).ellipse((200, 200, 600, 600), fill=255)
    true = np.asarray(large.resize((100, 100), Image.Resampling.BOX)) / 255
    color, behind = np.array([200, 60, 30]), np.array([20, 90, 220])
    image = Image.fromarray((true[..., None] * color + (1 - true[..., None]) * behind).round().astype(np.uint8))
    cut = np.asarray(cut_out(image)).astype(float)
    assert np.abs(cut[..., 3] / 255 - true).mean() < 0.01
    visible = cut[..., 3] > 100
    assert np.abs(cut[visible][:, :3] - color).max() < 40


@pytest.mark.parametrize("size", [(4000, 3000), (32, 32), (300, 900), (17, 400)])
def test_sizes(size):
    image = Image.new("RGB", size, (250, 250, 250))
    w, h = size
    ImageDraw.Draw(image).ellipse((w * 0.25, h * 0.25, w * 0.75, h * 0.75), fill=(30, 120, 60))
    cut = cut_out(image)
    assert cut.size == size
    covered = (np.asarray(cut.getchannel("A")) > 127).mean()
    assert covered == pytest.approx(np.pi / 16, rel=0.1)
    tensor = preprocess(cut)
    assert tensor.shape == (4, 518, 518) and tensor.dtype == torch.float32
    assert (tensor[3] == 1).any() and (tensor[3] == 0).any()


def test_a_single_pixel_image_has_no_foreground():
    with pytest.raises(ImageError, match="no foreground"):
        cut_out(Image.new("RGB", (1, 1), "red"))


def test_errors_say_what_cannot_be_cut_out(monkeypatch):
    with pytest.raises(ImageError, match="fully transparent"):
        cut_out(Image.new("RGBA", SIZE))
    with pytest.raises(ImageError, match="no alpha channel"):
        cut_out(picture(), method="alpha")
    with pytest.raises(ImageError, match="the background is not plain; give an image with transparency"):
        cut_out(picture("scene"), method="plain")
    with pytest.raises(ValueError, match="expected a method"):
        cut_out(picture(), method="magic")
    found = importlib.util.find_spec
    monkeypatch.setattr(foreground, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    lacks = "onnxruntime is not installed: pip install onnxruntime"
    with pytest.raises(ImageError, match=f"^the background is not plain and rembg cannot run, because {lacks}"):
        cut_out(picture("scene"))
    with pytest.raises(ImageError, match=f"^rembg cannot run, because {lacks}"):  # plain or not: that was not looked at
        cut_out(picture(), method="rembg")
    monkeypatch.setattr(foreground, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r'^rembg is not installed: pip install "rembg\[cpu\]"'):
        cut_out(picture(), method="rembg")


# --- rembg, with a model made here that takes what is bright for the object


def write_brightness_model(home: Path, name: str) -> Path:
    """models/<name>/<name>.onnx: sigmoid of 20 × (mean of the normalised channels - 0.6)."""
    onnx = pytest.importorskip("onnx")
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 320, 320])
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [1, 1, 320, 320])
    weights = [
        onnx.helper.make_tensor("weight", onnx.TensorProto.FLOAT, [1, 3, 1, 1], [20 / 3] * 3),
        onnx.helper.make_tensor("bias", onnx.TensorProto.FLOAT, [1], [-20 * 0.6]),
    ]
    nodes = [
        onnx.helper.make_node("Conv", ["image", "weight", "bias"], ["logits"]),
        onnx.helper.make_node("Sigmoid", ["logits"], ["mask"]),
    ]
    graph = onnx.helper.make_graph(nodes, "brightness", [image], [mask], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path = home / "models" / name / f"{name}.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def rembg_home(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    with monkeypatch.context() as without_jit:  # we never use pymatting, which compiles for a minute
        without_jit.setattr("numba.config.DISABLE_JIT", 1)
        pytest.importorskip("rembg")
    monkeypatch.setenv("REMBG_HOME", str(tmp_path))
    monkeypatch.setenv("U2NET_HOME", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "absent"))
    pooch = pytest.importorskip("pooch")

    def no_download(*arguments, **more):
        raise AssertionError("tried to download")

    monkeypatch.setattr(pooch, "retrieve", no_download)
    return tmp_path


def test_rembg_runs_a_model_that_is_there(rembg_home):
    assert "rembg has no model file such as" in why_rembg_cannot_run()
    write_brightness_model(rembg_home, "u2net")
    image = picture("scene", color=(250, 240, 230))
    ImageDraw.Draw(image).bitmap((0, 0), MASK, fill=(250, 240, 230))
    cut = cut_out(image)
    assert overlap(cut) > 0.9
    assert overlap(cut_out(image, method="rembg", rembg_model="u2net")) > 0.9
    assert why_rembg_cannot_run() is None


def test_rembg_downloads_nothing(rembg_home):
    with pytest.raises(ImageError, match=r"rembg has no model file such as .*u2net\.onnx"):
        cut_out(picture("scene"))
    with pytest.raises(ImageError, match=r"rembg has no model file such as .*silueta\.onnx"):
        cut_out(picture("scene"), method="rembg", rembg_model="silueta")
    with pytest.raises(ImageError, match="expected a rembg model of"):
        cut_out(picture("scene"), method="rembg", rembg_model="none")


def test_a_damaged_rembg_model_is_named(rembg_home):
    write_brightness_model(rembg_home, "u2net").write_bytes(b"damaged")
    with pytest.raises(ImageError, match=r"rembg failed with the model .*u2net\.onnx"):
        cut_out(picture("scene"))


# --- framing


def test_the_edge_of_a_centred_object_keeps_its_colour():
    image = Image.new("RGBA", (40, 20), (0, 255, 0, 0))  # green where it is transparent
    ImageDraw.Draw(image).rectangle((10, 5, 29, 14), fill=(200, 30, 30, 255))
    centred = np.asarray(centre_object(image, 64, 0.75))
    visible = centred[..., 3] > 0
    rows, columns = visible.nonzero()
    assert (columns.min(), columns.max()) == (8, 55) and abs(rows.max() - rows.min() - 23) <= 1
    assert (np.abs(centred[visible][:, :3].astype(int) - (200, 30, 30)) <= 3).all()


def test_only_what_can_be_centred_is():
    with pytest.raises(ImageError, match="fully transparent"):
        centre_object(Image.new("RGBA", (4, 4)), 8, 0.5)
    with pytest.raises(ValueError, match="expected a ratio"):
        centre_object(Image.new("RGBA", (4, 4)), 8, 1.5)


# --- preprocessing


@pytest.mark.parametrize("size", [224, 518])
def test_preprocess_frames_the_object(size):
    cut = cut_out(picture("blue"))
    tensor = preprocess(cut, size)
    rows, columns = tensor[3].nonzero().T
    margin = round(16 * size / 518) * size / (size + 2 * round(16 * size / 518))
    box = cut.getchannel("A").getbbox()
    width, height = box[2] - box[0], box[3] - box[1]
    longer = size - 2 * margin
    assert rows.max() - rows.min() + 1 == pytest.approx(longer * height / max(width, height), abs=2)
    assert columns.max() - columns.min() + 1 == pytest.approx(longer * width / max(width, height), abs=2)
    assert (rows.min() + rows.max()) / 2 == pytest.approx((size - 1) / 2, abs=1.5)
    outside = tensor[:3, tensor[3] == 0]
    assert outside.mean() > 0.97
    assert torch.equal(tensor[:, 0, 0], torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_preprocess_wants_alpha():
    with pytest.raises(ValueError, match="expected an RGBA image, got RGB"):
        preprocess(picture())


def test_reading_an_image_needs_neither_rembg_nor_transformers():
    code = "import sys, d3ds2.images.foreground, d3ds2.networks.image_encoder\n"
    code += "print(sys.modules.keys() & {'rembg', 'transformers'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
