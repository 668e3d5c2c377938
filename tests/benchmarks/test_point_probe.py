"""The probe finds what tokens tell, and what they do not."""

import sys

import torch

from benchmarks import point_probe
from d3ds2.networks.image_encoder import ImageEncoder, ImageTokens
from d3ds2.networks.model_files import save_network
from tests.support.training_chain import ENCODER
from tests.support.training_data import prepared
from training.data.device_pictures import PictureBatch


def test_the_probe_reads_points_that_tokens_hold(tmp_path_factory):
    data_dir = prepared(tmp_path_factory)
    pictures = point_probe.pictures_of(data_dir, ENCODER.image_size, 0)
    assert pictures.images.shape == (10, 4, 28, 28) and pictures.points.shape == (10, 4, 7, 7)

    class Knowing(torch.nn.Module):
        """Tokens of 2 x 2 patches that hold the points, after a class token and a register."""

        config = ENCODER

        def forward(self, images):
            rows = torch.arange(len(images)).repeat_interleave(6)
            return ImageTokens(self.tokens[: len(rows)], rows[:, None].expand(-1, 4).int(), rows >= 0, len(images), 6)

    knowing = Knowing()
    points = torch.nn.functional.adaptive_avg_pool2d(pictures.points, 2).flatten(2).transpose(1, 2)
    knowing.tokens = torch.nn.functional.pad(points[..., :3] / points[..., 3:].clamp(min=0.5), (0, 5, 2, 0)).flatten(
        0, 1
    )
    tokens, target, picture = point_probe.tokens_and_points(knowing, PictureBatch(pictures.images, pictures.points))
    assert len(tokens) == len(target) == len(picture) > 10 and tokens.shape[1] == 9
    torch.testing.assert_close(tokens[:, :3], target, atol=1e-6, rtol=0)
    assert point_probe.mean_distance(tokens[:, :3], target, picture) < 1e-6
    assert point_probe.mean_distance(target.mean(0), target, picture) > 0.1


def test_models_are_compared_side_by_side(tmp_path_factory, tmp_path, monkeypatch, capsys):
    data_dir = prepared(tmp_path_factory)
    for name in "ab":
        torch.manual_seed(ord(name))
        save_network(tmp_path / name, "image_encoder", ImageEncoder(ENCODER))
    arguments = [data_dir, data_dir, str(tmp_path / "a"), str(tmp_path / "b"), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["point_probe", *arguments])
    point_probe.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 and 10 pictures" and lines[1].startswith("mean point: ")
    for line in lines[1:]:
        seen, new = (float(part.split()[0]) for part in line.rpartition(": ")[2].split(", "))
        assert seen == new > 0
    assert len(lines) == 4
