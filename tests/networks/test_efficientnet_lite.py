"""The backbone against the package that published its weights, its place in the image encoder, and its files."""

import importlib

import pytest
import torch

from d3ds2.networks.efficientnet_lite import BACKBONES, EfficientNetLite, scaled_stages
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from d3ds2.networks.model_files import load_network, save_network

CONFIG = ImageEncoderConfig(
    image_size=64, patch_size=16, hidden_size=24, depth=1, num_heads=2, num_registers=2, backbone="efficientnet_lite0"
)


def published_model(backbone: str):
    """Build the package's own model with random weights and statistics, in evaluation mode."""
    package = importlib.import_module("efficientnet_lite_pytorch")  # of the extra `test`
    torch.manual_seed(0)
    name = backbone.replace("_", "-")
    model = package.EfficientNet.from_name(name, image_size=64).eval()  # sets its padding
    for name, values in model.state_dict().items():
        if name.endswith(("running_var", "weight")) and values.ndim == 1:
            values.uniform_(0.5, 1.5)
        elif values.ndim == 1:
            values.normal_(std=0.3)
    return model


def features_of(model, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Run the package's blocks; return the last output at strides 8, 16 and 32."""
    h, by_size = model._swish(model._bn0(model._conv_stem(pixels))), {}
    for block in model._blocks:
        h = block(h)
        by_size[h.shape[-1]] = h
    return [by_size[pixels.shape[-1] // stride] for stride in (8, 16, 32)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_are_those_of_the_published_model(backbone, tmp_path):
    theirs, ours = published_model(backbone), EfficientNetLite(backbone)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours.load_published(tmp_path / "weights.pth")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for made, expected, channels in zip(ours(pixels), features_of(theirs, pixels), ours.channels, strict=True):
            assert made.shape[1] == channels
            torch.testing.assert_close(made / expected.std(), expected / expected.std(), atol=1e-5, rtol=1e-5)


def test_widths_and_depths_are_scaled_as_published():
    assert [stage.channels for stage in scaled_stages("efficientnet_lite2")] == [16, 24, 48, 88, 120, 208, 352]
    assert [stage.blocks for stage in scaled_stages("efficientnet_lite2")] == [1, 3, 3, 4, 4, 5, 1]
    assert sum(p.numel() for p in EfficientNetLite("efficientnet_lite0").parameters()) == 2958848


def test_the_encoder_keeps_its_contract():
    """Check order, coordinates and foreground, and that a token sees its own patch most."""
    torch.manual_seed(1)
    encoder, images = ImageEncoder(CONFIG).eval(), torch.rand(2, 4, 64, 64)
    images[:, 3] = 0
    images[0, 3, 20, 50] = 1  # in patch row 1, column 3
    changed = images.clone()
    changed[0, :3, :16, 32:48] = 1  # row 0, column 2
    with torch.no_grad():
        tokens, moved = encoder(images), encoder(changed)
    assert tokens.features.shape == (2 * (3 + 16), 24) and tokens.counts == [19, 19]
    assert tokens.coords[3 + 4 * 1 + 3].tolist() == [0, 3, 1, 0]
    assert tokens.foreground[:19].nonzero().flatten().tolist() == [0, 1, 2, 3 + 4 * 1 + 3]
    change = (moved.features - tokens.features).norm(dim=-1)
    assert change[3:19].argmax() == 2 and change[19:].max() == 0


def test_an_encoder_with_a_backbone_is_saved_and_loaded(tmp_path):
    torch.manual_seed(2)
    encoder, images = ImageEncoder(CONFIG).eval(), torch.rand(1, 4, 64, 64)
    save_network(tmp_path, "image_encoder", encoder)
    loaded = load_network(tmp_path, "image_encoder")
    assert loaded.config == CONFIG
    with torch.no_grad():
        assert torch.equal(loaded(images).features, encoder(images).features)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"backbone": "resnet"}, "expected a backbone of"),
        ({"patch_size": 8}, "expected patch_size 16 and image_size divisible by 32"),
        ({"image_size": 48}, "expected patch_size 16 and image_size divisible by 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, error):
    values = {"image_size": 64, "patch_size": 16, "hidden_size": 24, "num_heads": 2, "backbone": "efficientnet_lite0"}
    with pytest.raises(ValueError, match=error):
        ImageEncoderConfig(**values | changes)


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights of EfficientNet-Lite.*absent\.pth"):
        EfficientNetLite("efficientnet_lite0").load_published(tmp_path / "absent.pth")
    for name, content in (("text.pth", b"no weights"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"expected weights of this EfficientNet-Lite in .*{name}"):
            EfficientNetLite("efficientnet_lite0").load_published(tmp_path / name)
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected weights of this EfficientNet-Lite in .*other\.pth"):
        EfficientNetLite("efficientnet_lite0").load_published(tmp_path / "other.pth")
