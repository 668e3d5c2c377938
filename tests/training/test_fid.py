"""Normal-FID: the network, the pictures and the distance."""

import numpy as np
import pytest
import torch
import trimesh
from scipy import linalg

from training.evaluation.fid import (
    FIDInception,
    features_of,
    frechet_distance,
    load_inception,
)
from training.evaluation.normal_pictures import normal_pictures


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, with the classes of the published one."""
    torch.manual_seed(0)
    state = FIDInception().state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    file = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, file)
    return file


def test_network_has_the_size_and_names_of_the_published_one(weights):
    network = load_inception(weights, torch.device("cpu"))
    assert sum(p.numel() for p in network.parameters()) == 21_785_568  # torchvision's, without its classes
    names = network.state_dict()
    assert len(names) == 94 * 6 and names["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert names["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert names["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)


def test_features_of_normals_and_their_distance(weights):
    network = load_inception(weights, torch.device("cpu"))
    ball, box = trimesh.creation.icosphere(3), trimesh.creation.box((1.0, 0.5, 1.5))
    balls, boxes = (features_of(network, normal_pictures(m.vertices, m.faces)) for m in (ball, box))
    assert balls.shape == (4, 2048) and balls.dtype == np.float64
    assert frechet_distance(balls, balls) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(balls, boxes) > 0


@pytest.mark.parametrize(("n", "m"), [(50, 40), (9, 40), (9, 7)])
def test_distance_is_that_of_the_definition(n, m):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12)), rng.normal(0.5, 2.0, (m, 12))
    covariance = [np.cov(features, rowvar=False) for features in (a, b)]
    root = linalg.sqrtm(covariance[0] @ covariance[1]).real
    defined = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(defined, rel=1e-6)
    with pytest.raises(ValueError, match="at least two pictures"):
        frechet_distance(a[:1], b)


def test_colours_are_normals_on_white():
    front, right, _, left = normal_pictures(*_cube())
    assert front[0, 0].tolist() == [255, 255, 255] and right[128, 128].tolist() == [255, 128, 128]
    assert front[128, 128].tolist() == [128, 128, 255] and left[128, 128].tolist() == [0, 128, 128]
    assert (normal_pictures(np.zeros((0, 3)), np.zeros((0, 3), int)) == 255).all()


def _cube():
    box = trimesh.creation.box((1.0, 1.0, 1.0))
    return box.vertices, box.faces


def test_files_of_other_things_are_named(tmp_path, weights):
    for content in (weights.read_bytes()[:1000], b"", b"text"):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged file .*cut\.pth"):
            load_inception(tmp_path / "cut.pth", torch.device("cpu"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected the InceptionV3 of FID in .*other\.pth"):
        load_inception(tmp_path / "other.pth", torch.device("cpu"))
    with pytest.raises(FileNotFoundError):
        load_inception(tmp_path / "none.pth", torch.device("cpu"))
