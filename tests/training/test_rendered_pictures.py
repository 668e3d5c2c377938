"""Pictures rendered of surfels are those of the ray tracer, as the networks see them, and new each time."""

import dataclasses

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from d3ds2.images.foreground import preprocess
from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.images.srgb import to_linear
from d3ds2.meshes.mesh_to_sdf import normalize_mesh
from tests.support.training_chain import Chain, assert_equal_parameters, copy_model, resumed, save_untrained
from tests.support.training_data import prepared
from training import train_dit, train_structure_dit, train_structure_vae
from training.data.damaged_files import TooManyDamagedError
from training.data.datasets import Choice
from training.data.device_pictures import PictureChoices
from training.data.rendered_pictures import RenderedPictures, RenderedPicturesConfig, SidesOfShapes, check_memory
from training.data.surfel_rendering import BEHIND, NOWHERE, fill_gaps, look, shade, shots_of
from training.data.surfels import sample_surfels, surfels_path, write_surfels
from training.point_loss import PointLossConfig
from training.run import read_metrics

CPU = torch.device("cpu")
S = 112


def shapes() -> dict[str, trimesh.Trimesh]:
    """A table with thin legs and a bowl, both with colours, and a plain cone."""
    legs = [
        trimesh.creation.box((0.08, 1.0, 0.08)).apply_translation((x, 0, z)) for x in (-0.5, 0.5) for z in (-0.3, 0.3)
    ]
    table = trimesh.util.concatenate([trimesh.creation.box((1.2, 0.1, 0.8)).apply_translation((0, 0.5, 0)), *legs])
    bowl = trimesh.creation.annulus(0.5, 0.6, 0.5).apply_transform(
        trimesh.transformations.rotation_matrix(1.2, (1, 0, 0))
    )
    return {"table": table, "bowl": bowl, "cone": trimesh.creation.cone(0.4, 1.0)}


def colors_of(mesh: trimesh.Trimesh) -> np.ndarray:
    place = (mesh.triangles_center - mesh.bounds[0]) / np.ptp(mesh.bounds, axis=0)
    return (60 + 160 * place).astype(np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surfels")
    surfels_path(folder, "").parent.mkdir()
    for name, mesh in shapes().items():
        colors = None if name == "cone" else colors_of(mesh)
        surfels = sample_surfels(normalize_mesh(mesh.vertices), mesh.faces, colors, 30000, np.random.default_rng(1))
        write_surfels(surfels_path(folder, name), surfels, {})
    return str(folder)


@pytest.mark.parametrize(
    ("name", "camera", "light"),
    [
        ("table", Camera(35, 20, 50), Light(60, -40, 0.7, 0.1, 0.3, 0.1, shadows=True, key_color=(1.0, 0.9, 0.8))),
        ("table", Camera(-8, -40, 28), Light(20, 60, 0.9, 0.1, 0.2, 0.2)),
        ("bowl", Camera(55, 5, 100), Light(40, -80, 0.8, 0.05, 0.3, 0.1, shadows=True)),
    ],
)
def test_pictures_are_those_of_the_ray_tracer(name, camera, light):
    mesh = shapes()[name]
    vertices, colors = normalize_mesh(mesh.vertices), colors_of(mesh)
    traced = Image.fromarray(MeshRenderer(vertices, mesh.faces, colors).render(camera, 256, light, 2))
    wanted = preprocess(traced, S)
    surfels = sample_surfels(vertices, mesh.faces, colors, 60000, np.random.default_rng(0))
    points = torch.from_numpy(surfels.points)[None] / 32767
    shots = shots_of([camera], [light], CPU)
    seen = look(points, shots, S)
    linear = torch.from_numpy(to_linear(surfels.colors))[seen.point]
    normals = torch.from_numpy(surfels.normals)[seen.point] / 127
    made = shade(seen, normals, linear, points, shots)[0]

    both = (made[3] > 0.5) & (wanted[3] > 0.5)
    assert both.sum() / ((made[3] > 0.5) | (wanted[3] > 0.5)).sum() > 0.93
    inner = -torch.nn.functional.max_pool2d(-both[None].float(), 5, 1, 2)[0] > 0.5  # contours differ by a pixel
    difference = (made[:3] - wanted[:3]).abs().mean(0)
    assert difference[inner].mean() < 0.04
    assert (difference[inner] > 0.15).float().mean() < 0.1  # edges of faces and shadows
    assert torch.equal(made[:3, made[3] < 0.5], torch.ones_like(made[:3, made[3] < 0.5]))
    dark = shade(seen, normals, linear, points, shots._replace(key=torch.zeros(1)))[0]
    assert (made[:3] - dark[:3]).mean() > 0.005  # the key light is seen


def test_a_point_behind_another_is_hidden_and_gaps_are_closed():
    far, near = (torch.full((1, 9, 9), depth).view(torch.int32).long() << 32 for depth in (3.0, 2.0))
    keys = near | 7
    keys[0, 4, 4] = far[0, 0, 0] | 8  # seen through a gap
    keys[0, 2, 6] = NOWHERE
    keys[0, :, 0] = NOWHERE  # beside the object
    filled = fill_gaps(keys)
    assert (filled[0, 4, 4] & 0xFF, filled[0, 2, 6] & 0xFF) == (7, 7)
    assert (filled[0, :, 0] == NOWHERE).all() and torch.equal(filled[0, 5:, 2:], keys[0, 5:, 2:])
    assert BEHIND > 1e6


def draw(pictures, choice, seed=0, **options):
    return pictures.draw(choice, torch.Generator().manual_seed(seed), **options)


def choice_of(shapes_, symmetries):
    n = len(shapes_)
    return Choice(torch.tensor(shapes_), torch.tensor(symmetries), torch.zeros(n).long(), torch.zeros(n).bool())


@pytest.fixture(scope="module")
def pictures(data_dir):
    return RenderedPictures(SidesOfShapes(data_dir, sorted(shapes()), S), RenderedPicturesConfig(), CPU)


def test_each_draw_is_new_and_follows_from_the_generator(pictures):
    choice = choice_of([0, 1, 2, 2], [0, 3, 5, 5])
    first, again, other = (draw(pictures, choice, seed) for seed in (0, 0, 1))
    assert first.images.shape == (4, 4, S, S) and first.points.shape == (4, 4, S // 4, S // 4)
    assert torch.equal(first.images, again.images) and torch.equal(first.points, again.points)
    for picture in (other.images[2], first.images[3]):
        assert (first.images[2] - picture).abs().mean() > 0.01
    assert first.images.min() >= 0 and first.images.max() <= 1


def test_a_part_of_a_batch_has_the_rows_of_the_whole(pictures):
    whole = draw(pictures, choice_of([0, 1, 2], [1, 4, 7]))
    part = draw(pictures, choice_of([2], [7]), draw_samples=lambda number, make: make(3)[2:])
    torch.testing.assert_close(part.images, whole.images[2:], rtol=0, atol=1e-5)


def test_point_maps_are_on_the_surface_as_it_is_turned(pictures, data_dir):
    for symmetry in range(8):
        drawn = draw(pictures, choice_of([2], [symmetry]), augment=False)  # the table
        xyz, is_seen = drawn.points[0, :3], drawn.points[0, 3] > 0.5
        assert 0.05 < is_seen.float().mean() < 0.9
        half = torch.tensor([0.95, 0.95 * 1.05 / 1.2, 0.95 * 0.8 / 1.2])
        half = half[[2, 1, 0]] if symmetry % 2 else half
        assert (xyz[:, is_seen].abs().amax(1) <= half + 0.01).all()
        assert (xyz[:, is_seen].abs().amax(1) >= half - 0.12).all()
        front = xyz[2, is_seen].mean()
        assert front > -0.1  # the camera looks from +Z


def test_cameras_fill_the_square_and_plain_shapes_get_new_colours(pictures):
    drawn = draw(pictures, choice_of([1] * 6, [0] * 6), augment=False)  # the cone has no colours
    rows = (drawn.images[:, 3] > 0.5).any(2).sum(1).float() / S
    columns = (drawn.images[:, 3] > 0.5).any(1).sum(1).float() / S
    assert ((torch.maximum(rows, columns) - 224 / 238).abs() < 0.03).all()
    colors = torch.stack([image[:3, image[3] > 0.5].mean(1) for image in drawn.images])
    assert torch.pdist(colors).min() > 0.01


def test_choices_give_every_side_and_its_mirror_image(data_dir):
    views = SidesOfShapes(data_dir, [*sorted(shapes()), "unknown"], S)
    assert views.names == ["bowl", "cone", "table"] and views.turns.symmetries().all()
    choices = PictureChoices(views, 8, 2, seed=0)
    drawn = [choices[step] for step in range(20)]
    assert {int(s) for choice in drawn for s in choice.symmetries} == set(range(8))
    with pytest.raises(FileNotFoundError, match=r"make them with python -m training\.sample_surfels"):
        SidesOfShapes(data_dir, ["unknown"], S)


def test_files_of_other_sizes_and_damaged_ones_are_named(data_dir, tmp_path, capsys):
    for name in ("bowl", "cone"):
        path = surfels_path(tmp_path, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(surfels_path(data_dir, name).read_bytes())
    damaged = surfels_path(tmp_path, "bowl")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    views = SidesOfShapes(str(tmp_path), ["bowl", "cone"], S)
    RenderedPictures(views, RenderedPicturesConfig(), CPU)
    assert "skipped: damaged file" in capsys.readouterr().err
    assert views.damaged.flags[0].all() and not views.damaged.flags[1].any()
    assert {int(s) for s in PictureChoices(views, 4, 1, seed=0)[0].shapes} == {1}

    surfels = sample_surfels(*_ball(), None, 100, np.random.default_rng(0))
    write_surfels(damaged, surfels, {})
    with pytest.raises(ValueError, match="expected 100 points as in other files, got 30000"):
        RenderedPictures(SidesOfShapes(str(tmp_path), ["bowl", "cone"], S), RenderedPicturesConfig(), CPU)
    for name in ("bowl", "cone"):
        surfels_path(tmp_path, name).write_bytes(b"")
    with pytest.raises(TooManyDamagedError):
        RenderedPictures(SidesOfShapes(str(tmp_path), ["bowl", "cone"], S), RenderedPicturesConfig(), CPU)


def _ball():
    ball = trimesh.creation.icosphere(radius=0.5)
    return np.asarray(ball.vertices), np.asarray(ball.faces)


def test_surfels_that_a_gpu_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 4 << 30))
    cuda = torch.device("cuda")
    check_memory(1000, 131072, cuda)
    with pytest.raises(
        ValueError, match=r"expected 14\.6 GiB free on cuda for 10000 shapes of 131072 surfels, got 3\.0"
    ):
        check_memory(10000, 131072, cuda)
    check_memory(10000, 131072, CPU)


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match=r"expected rendered\.elevation as \[low, high\], got \[3, 2\]"):
        RenderedPicturesConfig(elevation=(3, 2))
    with pytest.raises(ValueError, match=r"expected rendered\.light_tint in \[0, 1\), got 1"):
        RenderedPicturesConfig(light_tint=1)
    for config in (train_structure_dit.TrainStructureDiTConfig, train_dit.TrainDiTConfig):
        with pytest.raises(ValueError, match="rendered needs turn_to_camera, got false"):
            config(rendered=RenderedPicturesConfig(), turn_to_camera=False)


def test_networks_learn_from_rendered_pictures_and_resume_exactly(tmp_path_factory, tmp_path):
    chain = Chain(prepared(tmp_path_factory), tmp_path / "chain")
    train_structure_vae.train(chain.structure_vae)
    config = dataclasses.replace(
        chain.structure_dit, cache_views=False, rendered=RenderedPicturesConfig(), points=PointLossConfig(2.0)
    )
    copy_model(chain, tmp_path, "structure_vae")
    assert_equal_parameters(*resumed(train_structure_dit.train, config, tmp_path))
    points = [record["points"] for record in read_metrics(str(tmp_path / "whole"))]
    assert np.mean(points[-3:]) < 0.9 * np.mean(points[:3])


def test_latent_dit_learns_from_rendered_pictures_whole_and_in_parts(tmp_path_factory, tmp_path):
    chain = Chain(prepared(tmp_path_factory), tmp_path / "chain")
    save_untrained(chain)
    config = dataclasses.replace(chain.dit, rendered=RenderedPicturesConfig())
    assert_equal_parameters(*resumed(train_dit.train, config, tmp_path / "chain"))
    run = dataclasses.replace(config.run, steps=6, accumulate=3, out_dir=str(tmp_path / "parts"))
    train_dit.train(dataclasses.replace(config, run=run))
    losses = [[record["loss"] for record in read_metrics(tmp_path / part)] for part in ("chain/whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    from_files = dataclasses.replace(config, rendered=None, run=dataclasses.replace(run, out_dir=str(tmp_path / "f")))
    train_dit.train(from_files)
    assert [record["loss"] for record in read_metrics(tmp_path / "f")] != pytest.approx(losses[1], rel=1e-4)
