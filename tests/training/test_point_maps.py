"""Point maps lie on the shape that the picture shows, however it is turned, mirrored and moved, and can be learned."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from d3ds2.geometry.voxels import BLOCK
from d3ds2.images.foreground import preprocess
from d3ds2.images.render import Camera, MeshRenderer
from d3ds2.networks.image_encoder import ImageEncoder
from tests.support.training_chain import ENCODER, Chain, copy_model
from tests.support.training_data import R, prepared
from training import train_structure_dit, train_structure_vae
from training.data.datasets import Structures
from training.data.device_pictures import CELL, DevicePictures, PictureChoices
from training.data.point_maps import encode_points, point_map_of, read_point_map
from training.data.shape_files import list_shapes
from training.data.views import Views
from training.point_loss import CELLS, PointHead, PointLossConfig, point_loss
from training.run import read_metrics

CPU = torch.device("cpu")
SIZE = 56  # pixels per edge of a picture of the encoder


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    data_dir = prepared(tmp_path_factory)
    return Views(data_dir, list_shapes(data_dir, "train", R)[0], SIZE, augment=False)


def test_points_lie_on_the_mesh_where_the_camera_sees_it():
    vertices = np.array([[-0.5, -0.5, 0.25], [0.5, -0.5, 0.25], [0.5, 0.5, 0.25], [-0.5, 0.5, 0.25]])
    renderer = MeshRenderer(vertices, [[0, 1, 2], [0, 2, 3]])
    points = renderer.points(Camera(0, 0), 40)
    depth, _ = renderer.depth_and_normals(Camera(0, 0), 40)
    np.testing.assert_array_equal(np.isfinite(points).all(-1), np.isfinite(depth))
    seen = points[np.isfinite(depth)]
    np.testing.assert_allclose(seen[:, 2], 0.25, atol=1e-6)
    assert points[20, 30, 0] > 0.1 > -0.1 > points[20, 10, 0]  # +X is right in the picture of a camera on +Z
    assert points[10, 20, 1] > 0.1 > -0.1 > points[30, 20, 1]  # +Y is up
    with pytest.raises(ValueError, match="expected size >= 1, got 0"):
        renderer.points(Camera(), 0)


def test_a_coordinate_is_kept_within_half_a_step():
    points = np.random.default_rng(0).uniform(-1, 1, (8, 8, 3))
    points[0] = np.nan
    pixels = encode_points(points)
    assert not pixels[0].any() and (pixels[1:, :, 3] == 255).all()
    np.testing.assert_allclose(pixels[1:, :, :3] / 127.5 - 1, points[1:], atol=0.5 / 127.5 + 1e-9)


@pytest.mark.parametrize("size", [96, 40])
def test_a_point_map_is_cut_and_centred_as_its_picture(tmp_path, size):
    """A picture whose colours are its own place: the map of the same pixels then equals it."""
    across, down = np.meshgrid(np.arange(80), np.arange(80))
    pixels = np.stack([3 * across, 3 * down, 0 * down, 255 * ((across >= 10) & (across < 61) & (down > 40))], -1)
    pixels = (pixels * (pixels[..., 3:] > 0)).astype(np.uint8)
    Image.fromarray(pixels).save(point_map_of(tmp_path / "000.png"))
    picture = Image.fromarray(pixels)
    read = torch.from_numpy(read_point_map(picture, tmp_path / "000.png", size, size)).permute(2, 0, 1)
    made = preprocess(picture, size) * 255
    both = (read[3] > 0) & (made[3] > 0)
    assert both.sum() > 0.9 * (made[3] > 0).sum() and ((read[3] > 0) == (made[3] > 0)).float().mean() > 0.94
    inner = both & (-F.max_pool2d(-made[None, 3:], 5, 1, 2)[0, 0] > 0)  # the margin's resize blurs the contour
    assert (read[:2] - made[:2]).abs()[:, inner].max() <= 3 * 1.5 * max(1, 51 / size)


@pytest.mark.parametrize("augment", [False, True])
def test_drawn_points_lie_in_the_blocks_of_the_shape_as_the_picture_shows_it(views, augment):
    pictures = DevicePictures(views, CPU, 0, with_points=True)
    structures = Structures(views.files.folder.parent, views.names, R, 1, 0)
    choices = PictureChoices(views, 16, 1, seed=3)
    seen = set()
    for step in range(4):
        choice = choices[step]
        images, points = pictures.draw(choice, torch.Generator().manual_seed(step), augment)
        assert points.shape == (16, 4, SIZE // CELL, SIZE // CELL)
        mask = F.avg_pool2d(images[:, 3:], CELL)[:, 0]
        assert (mask - points[:, 3]).abs().mean() < 0.06
        for b in range(16):
            share = points[b, 3]
            whole = share > 0.999
            xyz = (points[b, :3] / share.clamp(min=0.5))[:, whole].T.numpy()
            grid = structures.grid(int(choice.shapes[b]), int(choice.symmetries[b]))
            blocks = np.floor((xyz + 1) / 2 * R / BLOCK).astype(int)
            # between the pixels of a curved surface, and of steps in depth, the mean of points lies off the surface
            assert grid[tuple(blocks.T)].mean() > (0.97 if augment else 0.99)
        seen |= {(int(shape), int(symmetry)) for shape, symmetry in zip(choice.shapes, choice.symmetries, strict=True)}
    assert len({symmetry for _, symmetry in seen}) > 3


def test_views_without_point_maps_and_options_that_exclude_them_are_refused(views, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("index.json", "shapes"):
        (folder / name).symlink_to(views.files.folder.parent / name)
    for file in views.files.folder.glob("*/*"):
        if not file.name.endswith("_points.png"):
            (folder / "views" / file.parent.name).mkdir(parents=True, exist_ok=True)
            (folder / "views" / file.parent.name / file.name).symlink_to(file)
    plain = Views(str(folder), views.names, SIZE)
    with pytest.raises(FileNotFoundError, match=r"expected the point map .*000_points.png; render .* points=128"):
        DevicePictures(plain, CPU, 0, with_points=True)
    with pytest.raises(ValueError, match="points needs train_image_encoder, and views_on_device or rendered"):
        train_structure_dit.TrainStructureDiTConfig(points=PointLossConfig())
    with pytest.raises(ValueError, match=r"expected points.weight > 0, got 0"):
        PointLossConfig(weight=0)


def test_the_loss_is_the_mean_distance_over_cells_that_see_the_object():
    torch.manual_seed(0)
    head, encoder = PointHead(16), ImageEncoder(ENCODER)
    torch.nn.init.normal_(head.linear.weight)
    tokens = encoder(torch.rand(2, 4, 28, 28))
    predicted = head(tokens, 2)
    assert predicted.shape == (2, 3, 2 * CELLS, 2 * CELLS)
    first = head.linear(tokens.features.unflatten(0, (2, -1))[1, 2])  # the upper left patch of the second picture
    torch.testing.assert_close(predicted[1, :, :2, :2].flatten(), first)
    points = torch.zeros(2, 4, 8, 8)
    points[0, :, :2, :2] = torch.tensor([0.3, -0.2, 0.5, 1.0])[:, None, None]
    points[0, :, :2, 2:4] = torch.tensor([0.1, 0.1, 0.1, 0.2])[:, None, None]  # hardly seen: does not count
    expected = (predicted[0, :, 0, 0] - torch.tensor([0.3, -0.2, 0.5])).norm() / 2
    torch.testing.assert_close(point_loss(predicted, points), expected)
    with pytest.raises(ValueError, match="expected all tokens of each picture"):
        head(tokens.select_foreground(), 2)


def test_an_encoder_learns_the_points_and_the_head_stays_at_home(tmp_path_factory, tmp_path):
    chain = Chain(prepared(tmp_path_factory), tmp_path / "chain")
    train_structure_vae.train(chain.structure_vae)
    (tmp_path / "copy").mkdir()
    copy_model(chain, tmp_path / "copy", "structure_vae")
    config = dataclasses.replace(
        chain.structure_dit,
        model_dir=str(tmp_path / "copy" / "model"),
        views_on_device=True,
        points=PointLossConfig(2.0),
    )
    train_structure_dit.train(config)
    points = [record["points"] for record in read_metrics(config.run.out_dir)]
    assert np.mean(points[-5:]) < 0.6 * np.mean(points[:5])
    exported = {file.stem for file in (tmp_path / "copy" / "model").glob("*.safetensors")}
    assert exported == {"structure_vae", "image_encoder", "structure_dit"}
