"""torch.hub's DINOv2 as our image encoder: its equations, written out here, give the same tokens."""

import pytest
import torch
from torch.nn import functional as F

from d3ds2.networks.image_encoder import IMAGENET_MEAN, IMAGENET_STD
from d3ds2.official.config import OfficialError
from d3ds2.official.dinov2 import from_hub_state_dict, load_dinov2
from tests.support.official_release import hub_state

HEADS = 2


def dinov2(state, images):
    """Return the tokens before the last norm, (B, 1 + 4 + P², C), for normalised images (B, 3, S, S)."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    B, _, D = x.shape
    x = torch.cat([state["cls_token"].expand(B, -1, -1), x], dim=1) + state["pos_embed"]
    x = torch.cat([x[:, :1], state["register_tokens"].expand(B, -1, -1), x[:, 1:]], dim=1)
    for i in range(len([key for key in state if key.endswith("ls1.gamma")])):
        p = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items()}
        h = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = F.linear(h, p["attn.qkv.weight"], p["attn.qkv.bias"]).unflatten(-1, (3, HEADS, -1)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div((D // HEADS) ** 0.5).softmax(-1)
        h = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + p["ls1.gamma"] * F.linear(h, p["attn.proj.weight"], p["attn.proj.bias"])
        h = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        h = F.gelu(F.linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        x = x + p["ls2.gamma"] * F.linear(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
    return x


@pytest.fixture(scope="module")
def state():
    return hub_state(64 * HEADS, depth=3)


def test_hub_weights_give_the_hub_tokens(state, tmp_path):
    images = torch.rand(2, 4, 56, 56)
    normalised = (images[:, :3] - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[
        :, None, None
    ]
    expected = F.layer_norm(dinov2(state, normalised), (64 * HEADS,), eps=1e-5)
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = load_dinov2(tmp_path / "dinov2.pth")
    assert encoder.config.num_heads == HEADS and encoder.config.depth == 3 and encoder.config.image_size == 56
    torch.testing.assert_close(encoder(images).features, expected.flatten(0, 1), atol=2e-5, rtol=1e-4)


def test_a_transformers_folder_is_read(state, tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(tmp_path / "dinov2")
    assert load_dinov2(tmp_path / "dinov2").config.hidden_size == 32
    (tmp_path / "dinov2" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(OfficialError, match="dinov2: ") as raised:
        load_dinov2(tmp_path / "dinov2")
    assert "\n" not in str(raised.value)
    with pytest.raises(OfficialError, match="missing file"):
        load_dinov2(tmp_path / "absent")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("register_tokens"), "is not DINOv2 with registers"),
        (lambda s: s.pop("blocks.1.norm1.bias"), r"misses tensors: encoder\.layer\.1\.norm1\.bias"),
        (lambda s: s.update({"blocks.0.mlp.w12.weight": torch.zeros(2)}), r"has unexpected tensors: .*w12"),
        (lambda s: s.update({"norm2": torch.zeros(2)}), "has unexpected tensors: norm2"),
        (
            lambda s: s.update({"blocks.0.attn.qkv.bias": torch.zeros(5)}),
            r"misshapen tensors: blocks\.0\.attn\.qkv",
        ),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.zeros(5)}), "has misshapen tensors: .*layer_scale1"),
        (lambda s: s.update(teacher={}), "expected floating tensors in the file, teacher is not one"),
    ],
)
def test_other_weights_are_refused(state, tmp_path, edit, message):
    changed = dict(state)
    edit(changed)
    with pytest.raises(OfficialError, match=message):
        from_hub_state_dict(changed, tmp_path / "dinov2.pth")
