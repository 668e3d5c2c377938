"""Scores by networks of others: their checkpoints are read from files, here small and random ones."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from d3ds2.images.render import Camera
from training.evaluation import image_towers
from training.evaluation import point_encoders as points
from training.evaluation.fid import FIDInception
from training.evaluation.image_towers import load_clip
from training.evaluation.learned_scores import NAMES, LearnedScores, WeightsConfig, learned_table
from training.evaluation.shape_scores import RESULT, TRUTH, Appearance, ScoreConfig, Shape

CPU = torch.device("cpu")


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor of a network random values, its batch norms' variances positive ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.1 * drawn.abs() if "var" in name else 0.1 * drawn)
    return network.eval()


def has_timm() -> bool:
    try:
        import timm  # noqa: F401
    except Exception:  # its torchvision may not fit this torch
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP folder of width 16 -> 24, and checkpoints of ULIP-2 and OpenShape laid out as the public ones."""
    folder = tmp_path_factory.mktemp("weights")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=24,
    )  # fmt: skip
    randomise(CLIPVisionModelWithProjection(config)).save_pretrained(folder / "clip")
    ulip = randomise(points.ULIP2(64, 2, 1, 24)).state_dict()
    named = {f"module.{'' if k == 'pc_projection' else 'point_encoder.'}{k}": v for k, v in ulip.items()}
    towers = {"module.logit_scale": torch.zeros(()), "module.open_clip_model.visual.proj": torch.zeros(2, 2)}
    torch.save({"state_dict": named | towers, "args": argparse.Namespace(model="ULIP2")}, folder / "ulip2.pt")
    shape = randomise(points.OpenShape(64, 2, 1, 24)).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in shape.items()}, "epoch": 3}, folder / "openshape.pt")
    torch.save(randomise(FIDInception()).state_dict(), folder / "inception.pth")
    return folder


ULIP2_NAMES = """encoder.first_conv.0.weight encoder.second_conv.3.bias reduce_dim.weight cls_pos pos_embed.2.weight
    blocks.blocks.1.attn.qkv.weight blocks.blocks.0.mlp.fc2.bias norm.bias"""
OPENSHAPE_NAMES = """ppat.sa.mlp_convs.0.weight ppat.sa.mlp_bns.2.running_var ppat.lift.0.weight ppat.lift.2.bias
    ppat.cls_token ppat.transformer.layers.1.0.fn.to_qkv.weight ppat.transformer.layers.0.0.fn.to_out.0.bias
    ppat.transformer.layers.0.1.fn.net.3.weight proj.weight"""


def test_names_of_tensors_are_those_of_the_public_code(folder):
    ulip = torch.load(folder / "ulip2.pt", weights_only=False)["state_dict"]
    assert all(f"module.point_encoder.{name}" in ulip for name in ULIP2_NAMES.split())
    assert "module.point_encoder.blocks.blocks.0.attn.qkv.bias" not in ulip and "module.pc_projection" in ulip
    shape = torch.load(folder / "openshape.pt", weights_only=False)["state_dict"]
    assert all(f"module.{name}" in shape for name in OPENSHAPE_NAMES.split())


def cloud(seed: int = 0, number: int = 600) -> torch.Tensor:
    return points.prepare_points(torch.randn(2, number, 3, generator=torch.Generator().manual_seed(seed)))


def test_points_are_centred_scaled_and_grey():
    prepared = points.prepare_points(torch.tensor([[[0.0, 2.0, 0.0], [0.0, 0.0, 4.0]]]))
    assert prepared[0, :, 3:].eq(0.4).all() and prepared[0, :, :3].norm(dim=-1).amax() == pytest.approx(1)
    swapped = points.prepare_points(torch.tensor([[[0.0, 2.0, 0.0], [0.0, 0.0, 4.0]]]), z_up=True)
    assert torch.equal(swapped[..., [0, 2, 1]], prepared[..., :3])


def test_groups_of_points():
    line = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, 0.0, 0.0])  # 0 ... 5 on the x axis
    assert points.farthest_points(line, 3).tolist() == [[0, 5, 2]]
    centres = line[:, [0, 4]]
    assert points.nearest_groups(line, centres, 2).sort().values[0, 0].tolist() == [0, 1]
    assert points.ball_groups(line, centres, 4, 1.5).tolist() == [[[0, 1, 0, 0], [3, 4, 5, 3]]]


@pytest.mark.parametrize(("load", "file"), [(points.load_ulip2, "ulip2.pt"), (points.load_openshape, "openshape.pt")])
def test_encoders_read_their_checkpoints(folder, load, file, monkeypatch):
    monkeypatch.setattr(points.TokenEncoder, "num_groups", 32)
    monkeypatch.setattr(points.OpenShape, "num_groups", 32)
    with torch.no_grad():
        first, other = load(folder / file)(cloud()), load(folder / file)(cloud(1))
        turned = load(folder / file)(torch.flip(cloud(), [0]))
    assert first.shape == (2, 24) and first.isfinite().all() and not torch.allclose(first, other)
    torch.testing.assert_close(turned.flip(0), first)


@pytest.mark.skipif(not has_timm(), reason="timm cannot be imported")
def test_uni3d_reads_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(points.TokenEncoder, "num_groups", 32)
    whole = randomise(points.Uni3D(points.UNI3D_TOWERS[192], 16, 24))
    named = {f"point_encoder.{k}": v for k, v in whole.state_dict().items()}
    pixels = {f"point_encoder.visual.{k}": torch.zeros(1) for k in ("cls_token", "pos_embed", "patch_embed.proj.bias")}
    torch.save({"module": {"logit_scale": torch.zeros(()), **named, **pixels}}, tmp_path / "uni3d.pt")
    with torch.no_grad():
        torch.testing.assert_close(points.load_uni3d(tmp_path / "uni3d.pt")(cloud()), whole(cloud()))
    assert "point_encoder.visual.blocks.3.attn.q_bias" in named and "point_encoder.visual.fc_norm.weight" in named


@pytest.mark.skipif(not has_timm(), reason="timm cannot be imported")
def test_eva_reads_the_file_of_open_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(image_towers, "EVA", "eva02_tiny_patch14_224")  # the enormous one has 4.4 billion weights
    network = randomise(points.make_eva("eva02_tiny_patch14_224", 1024, "token"))
    named = {f"visual.trunk.{k}": v for k, v in network.state_dict().items()} | {"logit_scale": torch.zeros(())}
    torch.save(named, tmp_path / "open_clip_pytorch_model.bin")
    tower = image_towers.load_eva(tmp_path / "open_clip_pytorch_model.bin", CPU, torch.float32)
    with torch.no_grad():
        vectors = tower(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert vectors.shape == (2, 1024) and vectors.isfinite().all()
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))


def appearance(mesh: trimesh.Trimesh) -> Appearance:
    shape = Shape(mesh.vertices, mesh.faces, ScoreConfig("", 32, num_points=600, cells=16))
    return shape.appearance(Camera())


@pytest.mark.long
def test_scores_of_a_result_and_the_truth(folder, monkeypatch):
    monkeypatch.setattr(points.TokenEncoder, "num_groups", 32)
    monkeypatch.setattr(points.OpenShape, "num_groups", 32)
    clip, names = str(folder / "clip"), {n: str(folder / f"{n}.pt") for n in ("ulip2", "openshape")}
    config = WeightsConfig(str(folder / "inception.pth"), clip, clip_bigg=clip, **names)
    scores = LearnedScores.load(config, CPU, torch.float32)
    ball, box = appearance(trimesh.creation.icosphere(2, 0.5)), appearance(trimesh.creation.box((1.0, 0.5, 0.8)))
    empty = Shape(np.zeros((0, 3)), np.zeros((0, 3)), ScoreConfig("", 32, cells=16)).appearance(Camera())
    picture = np.random.default_rng(0).integers(255, size=(40, 40, 3), dtype=np.uint8)
    records = [scores.add(picture, {RESULT: result, TRUTH: ball}) for result in (ball, box, empty)]
    assert records[0][RESULT] == records[0][TRUTH] != records[1][RESULT]
    assert set(records[0][RESULT]) == {"clip", "ulip2", "openshape"} and set(records[2][RESULT].values()) == {0.0}
    assert all(-1 <= value <= 1 for record in records for value in record[RESULT].values())
    summaries, text = learned_table(scores, records)
    assert summaries["normal_fid"] > 0 and summaries[RESULT]["ulip2"]["count"] == 3
    header = "| method | CLIP similarity ↑ | ULIP-2 ↑ | OpenShape ↑ | Normal-FID ↓ |"
    assert header in text and "Left out, since no weights were given: Uni3D (weights.uni3d)." in text


def test_without_weights_one_line_says_what_is_left_out():
    summaries, text = learned_table(LearnedScores.load(WeightsConfig(), CPU, torch.float32), [{RESULT: {}, TRUTH: {}}])
    assert text.count("\n") == 1 and "Normal-FID (weights.inception), CLIP similarity (weights.clip)" in text
    assert all(f"{name} (weights.{key})" in text for key, name in NAMES.items()) and summaries[RESULT] == {}
    with pytest.raises(ValueError, match=r"weights\.uni3d needs weights\.eva_clip"):
        dataclasses.replace(WeightsConfig(), uni3d="x")


def test_wrong_files_are_named(folder, tmp_path):
    wrong = [
        (points.load_ulip2, folder / "openshape.pt", "expected the point encoder of ULIP-2 in"),
        (points.load_openshape, folder / "ulip2.pt", "expected the PointBERT of OpenShape in"),
        (points.load_uni3d, folder / "ulip2.pt", "expected the point encoder of Uni3D in"),
        (lambda file: load_clip(file, CPU, torch.float32), folder / "none", "expected a folder of transformers"),
        (lambda file: load_clip(file, CPU, torch.float32), tmp_path, "expected a CLIP of transformers in"),
    ]
    for load, file, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            load(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "cut.pt").write_bytes((folder / "ulip2.pt").read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"damaged file .*cut\.pt"):
        points.load_ulip2(tmp_path / "cut.pt")
