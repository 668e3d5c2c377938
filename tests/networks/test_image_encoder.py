"""Order, coordinates and foreground of image tokens; the encoder against transformers' own model."""

import pytest
import torch
from torch.nn.functional import layer_norm

from d3ds2.networks.image_encoder import IMAGENET_MEAN, IMAGENET_STD, ImageEncoder, ImageEncoderConfig, ImageTokens

CONFIG = ImageEncoderConfig(image_size=56, hidden_size=24, depth=2, num_heads=2, num_registers=3)
PATCHES = 4  # per edge


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ImageEncoder(CONFIG)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    images = torch.rand(2, 4, 56, 56)
    images[:, 3] = 0
    images[0, 3, 15, 40] = 1  # one pixel, in patch row 1, column 2
    images[1, 3, 28:, :14] = 0.2
    return images


def test_order_and_coordinates(encoder, images):
    tokens = encoder(images)
    assert tokens.batch_size == 2 and tokens.counts == [20, 20] and tokens.cu_seqlens.tolist() == [0, 20, 40]
    assert tokens.coords.dtype == torch.int32 and tokens.features.shape == (40, 24)
    assert tokens.coords[:4].tolist() == [[0, 0, 0, 1]] * 4
    for b in range(2):
        for row in range(PATCHES):
            for column in range(PATCHES):
                assert tokens.coords[20 * b + 4 + PATCHES * row + column].tolist() == [b, column, row, 0]


def test_foreground_is_where_the_mask_touches(encoder, images):
    tokens = encoder(images)
    kept = tokens.select_foreground()
    assert kept.counts == [5, 6]
    assert kept.foreground.all()
    assert kept.coords[4].tolist() == [0, 2, 1, 0]
    assert kept.coords[-2:].tolist() == [[1, 0, 2, 0], [1, 0, 3, 0]]
    assert torch.equal(kept.features, tokens.features[tokens.foreground])
    assert kept.cu_seqlens.tolist() == [0, 5, 11]


def test_a_change_of_a_patch_moves_its_token_most(encoder, images):
    """Check that rows and columns are not swapped: a bright patch at row 0, column 3 changes patch token 3."""
    changed = images.clone()
    changed[0, :3, :14, 42:] = 1
    with torch.no_grad():
        change = (encoder(changed).features - encoder(images).features).norm(dim=-1)
    assert change[:20].argmax() == 4 + 3
    assert change[20:].max() == 0


def test_features_are_transformers_before_the_last_norm(tmp_path, images):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.Dinov2WithRegistersConfig(
        image_size=56,
        patch_size=14,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=4,
    )
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = ImageEncoder.from_dinov2(tmp_path)
    assert ours.config == ImageEncoderConfig(image_size=56, hidden_size=24, depth=2, num_heads=2, num_registers=4)

    normed = (images[:, :3] - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        before = theirs(normed, output_hidden_states=True).hidden_states[-1]
        features = ours(images).features
    torch.testing.assert_close(features, layer_norm(before, (24,), eps=1e-5).flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_a_folder_without_dinov2_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in"):
        ImageEncoder.from_dinov2(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2_with_registers", "use_swiglu_ffn": true}')
    with pytest.raises(ValueError, match="expected DINOv2 with registers, small to large"):
        ImageEncoder.from_dinov2(tmp_path)


def test_every_parameter_is_trained(encoder, images):
    """A parameter without a gradient would be useless; equal registers would act as a single one."""
    tokens = encoder(images)
    generator = torch.Generator().manual_seed(0)
    (tokens.features * torch.randn(tokens.features.shape, generator=generator)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k_proj.bias") and not name.endswith("key.bias"):  # softmax cancels it
            assert parameter.grad.abs().max() > 0, name
    encoder.zero_grad()
    registers = encoder.embeddings.register_tokens[0]
    assert (registers[0] - registers[1]).abs().max() > 1e-3


def test_half_precision_and_autocast(encoder, images):
    expected = encoder(images).features.detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(images).features.detach(), expected, atol=0.15, rtol=0.15)
    half = ImageEncoder(CONFIG)
    half.load_state_dict(encoder.state_dict())
    tokens = half.bfloat16()(images.bfloat16())
    assert tokens.features.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.features.float(), expected, atol=0.2, rtol=0.2)


def test_tokens_are_joined_and_split(encoder, images):
    tokens = encoder(images).select_foreground()
    both = ImageTokens.cat([tokens, tokens.zeroed()])
    assert both.batch_size == 4 and both.counts == [5, 6, 5, 6]
    assert torch.equal(both.coords[11:, 0], tokens.coords[:, 0] + 2)
    assert torch.equal(both.coords[11:, 1:], tokens.coords[:, 1:])
    assert both.features[11:].abs().max() == 0 and torch.equal(both.features[:11], tokens.features)
    second = both.sample(1)
    assert second.batch_size == 1 and torch.equal(second.features, tokens.features[5:11])
    assert second.coords[:, 0].max() == 0
    with pytest.raises(ValueError, match="image index below 4, got 4"):
        both.sample(4)
    dropped = tokens.where(torch.tensor([False, True]))
    assert dropped.features[:5].abs().max() == 0 and torch.equal(dropped.features[5:], tokens.features[5:])
    assert tokens.to("cpu", torch.float16).features.dtype == torch.float16
    assert tokens.to("cpu", torch.float16).coords.dtype == torch.int32


def test_wrong_inputs_are_named(encoder):
    with pytest.raises(ValueError, match=r"expected images \(B, 4, 56, 56\), got \(1, 3, 56, 56\)"):
        encoder(torch.rand(1, 3, 56, 56))
    with pytest.raises(ValueError, match="divisible by 14, got 57"):
        ImageEncoderConfig(image_size=57)
    with pytest.raises(ValueError, match="divisible by 5 heads, got 24"):
        ImageEncoderConfig(hidden_size=24, num_heads=5)
    with pytest.raises(ValueError, match="expected depth from 1 to 256, got 0"):
        ImageEncoderConfig(depth=0)
    with pytest.raises(ValueError, match=r"expected features \(L, C\)"):
        ImageTokens(torch.zeros(3, 2), torch.zeros(2, 4, dtype=torch.int32), torch.ones(3, dtype=torch.bool), 1)


def test_weights_have_the_published_names_and_load_from_them():
    config = ImageEncoderConfig(image_size=28, hidden_size=32, depth=2, num_heads=2)
    encoder = torch.nn.ModuleDict({"encoder": ImageEncoder(config)})
    state = encoder.state_dict()
    layers = {f"encoder.encoder.layer.{i}.attention.attention.{n}.weight" for i in (0, 1) for n in ("query", "value")}
    assert layers <= state.keys() and not any("_proj" in name for name in state if "patch" not in name)
    again = torch.nn.ModuleDict({"encoder": ImageEncoder(config)})
    again.load_state_dict(state)
    for (name, a), b in zip(encoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_numbers_of_equal_images_are_known_without_counting(encoder, images):
    tokens = encoder(images)
    assert tokens.per_image == 20
    joined = ImageTokens.cat([tokens, tokens.zeroed()])
    counted = ImageTokens(joined.features, joined.coords, joined.foreground, joined.batch_size)
    assert joined.per_image == 20 and counted.per_image is None
    assert joined.counts == counted.counts and torch.equal(joined.cu_seqlens, counted.cu_seqlens)
    mixed = ImageTokens.cat([tokens, tokens.select_foreground()])
    assert mixed.per_image is None and mixed.counts == [20, 20, *tokens.select_foreground().counts]
    with pytest.raises(ValueError, match="expected 2 times 19 tokens, got 40"):
        ImageTokens(tokens.features, tokens.coords, tokens.foreground, 2, 19)
