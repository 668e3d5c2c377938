"""The renderer against shapes whose pictures can be computed by hand."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.images.contact_sheet import contact_sheet
from d3ds2.images.render import Camera, Light, MeshRenderer, direction, render, render_sides

FLAT = Light(key=0, fill=0, sky=1, ground=1)  # albedo alone


def box(extents=(1.0, 1.0, 1.0), center=(0, 0, 0)):
    mesh = trimesh.creation.box(extents)
    return mesh.vertices + np.array(center), mesh.faces


def lopsided():
    """A mesh without any symmetry, coloured by face."""
    parts = [trimesh.creation.box((1, 0.5, 0.7)), trimesh.creation.icosphere(1, 0.3), trimesh.creation.cone(0.2, 0.6)]
    parts[1].apply_translation((0.5, 0.4, 0.2))
    parts[2].apply_translation((-0.3, 0.1, 0.3))
    mesh = trimesh.util.concatenate(parts)
    colors = np.random.default_rng(0).integers(40, 255, (len(mesh.faces), 3)).astype(np.uint8)
    return np.array(mesh.vertices), np.array(mesh.faces), colors


def test_sphere_is_a_disc_of_the_right_size():
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=0.5)
    camera = Camera(elevation=25, azimuth=40, focal_mm=50, radius=1.0)
    alpha = render(mesh.vertices, mesh.faces, camera, 256, supersample=4)[..., 3] / 255
    # the cone that touches a sphere of radius r at distance d has tan = r / sqrt(d² - r²)
    radius = 0.5 / math.sqrt(camera.distance**2 - 0.25) / camera.half_width * 128
    assert alpha.sum() == pytest.approx(math.pi * radius**2, rel=0.003)
    rows, columns = np.mgrid[:256, :256]
    center = (alpha * rows).sum() / alpha.sum(), (alpha * columns).sum() / alpha.sum()
    assert center == pytest.approx((127.5, 127.5), abs=0.02)


def test_bounding_sphere_fits_exactly():
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=3.0)
    rows, columns = np.nonzero(render(mesh.vertices + 7, mesh.faces, Camera(focal_mm=30), 200)[..., 3])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 199, 0, 199)


def test_box_corners_land_where_the_pinhole_puts_them():
    vertices, faces = box((1.0, 0.6, 0.4))
    camera = Camera(elevation=0, azimuth=0, focal_mm=36, target=(0, 0, 0), radius=1.0)
    alpha = render(vertices, faces, camera, 400)[..., 3] > 0
    rows, columns = np.nonzero(alpha)
    front = camera.distance - 0.2  # the nearest face hides the others
    half = [edge / 2 / front / camera.half_width * 200 for edge in (1.0, 0.6)]
    assert (columns.min(), columns.max() + 1) == pytest.approx((200 - half[0], 200 + half[0]), abs=1)
    assert (rows.min(), rows.max() + 1) == pytest.approx((200 - half[1], 200 + half[1]), abs=1)
    assert alpha.sum() == pytest.approx(4 * half[0] * half[1], rel=0.01)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "side"),
    [(0, 0, "+z"), (90, 0, "+x"), (180, 0, "-z"), (-90, 0, "-x"), (270, 0, "-x"), (0, 90, "+y"), (0, -90, "-y")],
)
def test_camera_sees_the_side_it_stands_on(azimuth, elevation, side):
    vertices, faces = box()
    normals = trimesh.Trimesh(vertices, faces, process=False).face_normals
    names = np.array(["-x", "+x", "-y", "+y", "-z", "+z"])
    face_side = names[2 * np.abs(normals).argmax(1) + (normals.sum(1) > 0)]
    palette = {name: (40 * k + 20, 255 - 40 * k, 90) for k, name in enumerate(names)}
    colors = np.array([palette[name] for name in face_side], dtype=np.uint8)
    picture = render(vertices, faces, Camera(elevation, azimuth), 33, colors, light=FLAT)
    assert tuple(picture[16, 16, :3]) == palette[side]


def test_plus_x_is_on_the_right_and_plus_y_above():
    vertices, faces = box((0.2, 0.2, 0.2), center=(0.5, 0.3, 0))
    rows, columns = np.nonzero(render(vertices, faces, Camera(0, 0, target=(0, 0, 0), radius=1.0), 64)[..., 3])
    assert columns.mean() > 40 and rows.mean() < 28


def test_camera_stands_in_its_direction_at_its_distance():
    camera = Camera(elevation=30, azimuth=50, focal_mm=18)
    np.testing.assert_allclose(camera.axes @ camera.axes.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(camera.axes), 1, atol=1e-6)  # right, up, backward: right-handed
    np.testing.assert_allclose(camera.axes[2], direction(30, 50))
    assert camera.distance == pytest.approx(math.sqrt(2))  # 18 mm: 90° of view, sin 45°


def test_mirrored_mesh_gives_the_flipped_picture():
    vertices, faces, colors = lopsided()
    camera, light = Camera(20, 35, 60), Light(azimuth=-20, shadows=True)
    picture = render(vertices, faces, camera, 120, colors, light=light)
    mirrored = render(
        vertices * [-1, 1, 1],
        faces[:, ::-1],
        dataclasses.replace(camera, azimuth=-35),
        120,
        colors,
        light=dataclasses.replace(light, azimuth=20),
    )
    difference = np.abs(picture.astype(int) - mirrored[:, ::-1]).max(axis=-1)
    assert (picture[..., 3] > 0).mean() > 0.1
    assert (difference > 2).mean() < 0.003  # a ray along an edge may go either way


def test_background_is_empty_and_the_object_opaque():
    vertices, faces, colors = lopsided()
    picture = render(vertices, faces, Camera(), 100, colors)
    assert set(np.unique(picture[..., 3])) == {0, 255}
    assert not picture[picture[..., 3] == 0].any()


def test_supersampling_softens_edges_and_keeps_straight_colours():
    vertices, faces = box()
    sharp, soft = (
        render(vertices, faces, Camera(20, 30), 80, [[200, 100, 50]], light=FLAT, supersample=s) for s in (1, 4)
    )
    partial = (soft[..., 3] > 0) & (soft[..., 3] < 255)
    assert 30 < partial.sum() < 400
    assert np.abs(soft[..., 3].astype(int).sum() - sharp[..., 3].astype(int).sum()) < 0.01 * sharp[..., 3].sum()
    assert (np.abs(soft[soft[..., 3] > 0][:, :3].astype(int) - [200, 100, 50]) <= 1).all()  # not darkened by alpha


def test_unlit_colours_come_back_exactly():
    vertices, faces = box()
    for value in (0, 1, 17, 128, 254, 255):
        picture = render(vertices, faces, Camera(), 16, [[value, 255 - value, 60]], light=FLAT)
        assert tuple(picture[8, 8]) == (value, 255 - value, 60, 255)


def test_a_grey_mesh_has_no_hue():
    vertices, faces = box()
    picture = render(vertices, faces, Camera(20, 30), 40)
    assert (picture[..., 0] == picture[..., 1]).all() and (picture[..., 1] == picture[..., 2]).all()
    assert len(np.unique(picture[picture[..., 3] > 0][:, 0])) == 3  # three sides, each lit in its own way


def test_winding_does_not_change_the_picture():
    vertices, faces, colors = lopsided()
    turned = faces.copy()
    turned[::2] = turned[::2, ::-1]
    a, b = (render(vertices, f, Camera(), 90, colors, light=Light(shadows=True)) for f in (faces, turned))
    assert (np.abs(a.astype(int) - b) > 2).mean() < 0.002


def test_lambert_shading():
    vertices, faces = box()
    light = Light(elevation=0, azimuth=60, key=0.8, fill=0, sky=0, ground=0)
    value = render(vertices, faces, Camera(0, 0), 17, [[255, 255, 255]], light=light)[8, 8, 0] / 255
    assert ((value + 0.055) / 1.055) ** 2.4 == pytest.approx(0.8 * math.cos(math.radians(60)), abs=0.005)


def test_shadow_falls_away_from_the_light():
    floor, pole = box((2, 0.1, 2)), box((0.1, 1, 0.1), center=(0, 0.55, 0))
    vertices = np.concatenate([floor[0], pole[0]])
    faces = np.concatenate([floor[1], pole[1] + 8])
    light = Light(elevation=45, azimuth=90, fill=0, sky=0.1, ground=0.1)
    camera = Camera(90, 0, target=(0, 0, 0), radius=1.6)  # from above: +x on the right
    lit, shadowed = (
        render(vertices, faces, camera, 101, light=dataclasses.replace(light, shadows=s))[50, :, 0].astype(int)
        for s in (False, True)
    )
    darker = np.nonzero(lit - shadowed > 50)[0]
    assert len(darker) > 10 and darker.max() < 50  # light from the right, shadow on the left


def test_smooth_shading_of_a_coarse_sphere_comes_near_a_fine_one():
    coarse, fine = trimesh.creation.icosphere(2), trimesh.creation.icosphere(5)
    camera = Camera(radius=1.2)
    truth = render(fine.vertices, fine.faces, camera, 100).astype(int)
    flat, smooth = (render(coarse.vertices, coarse.faces, camera, 100, smooth=s).astype(int) for s in (False, True))
    common = (truth[..., 3] > 0) & (flat[..., 3] > 0)
    assert np.abs(smooth - truth)[common].mean() < 0.3 * np.abs(flat - truth)[common].mean()


def test_same_arguments_same_picture():
    vertices, faces, colors = lopsided()
    light = Light(shadows=True)
    first = render(vertices, faces, Camera(), 90, colors, light=light, supersample=2)
    renderer = MeshRenderer(vertices, faces, colors)
    renderer.render(Camera(azimuth=77), 50)  # earlier renderings do not matter
    np.testing.assert_array_equal(first, renderer.render(Camera(), 90, light, supersample=2))


def test_a_camera_inside_the_box_fills_the_picture():
    vertices, faces = box((10, 10, 10))
    assert (render(vertices, faces, Camera(10, 20, target=(0, 0, 0), radius=0.5), 30)[..., 3] == 255).all()


def test_what_is_no_mesh_is_refused():
    vertices, faces = box()
    for bad_vertices, bad_faces, message in [
        (vertices * np.nan, faces, "finite vertices"),
        (vertices[:, :2], faces, "finite vertices"),
        (vertices, faces[:0], "faces"),
        (vertices, faces + 1, "below 8, got 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            MeshRenderer(bad_vertices, bad_faces)
    with pytest.raises(ValueError, match="face_colors"):
        MeshRenderer(vertices, faces, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="size"):
        render(vertices, faces, Camera(), 0)
    with pytest.raises(ValueError, match="focal_mm"):
        Camera(focal_mm=0)


def test_missing_embreex_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex", None)
    with pytest.raises(ImportError, match="pip install embreex"):
        render(*box(), Camera(), 8)


def test_sides_go_round_the_object():
    vertices, faces = box((1.0, 0.5, 0.2))
    widths = [(picture[..., 3] > 0).any(axis=0).sum() for picture in render_sides(vertices, faces, 60)]
    assert widths[0] == pytest.approx(widths[2], abs=1) and widths[1] == pytest.approx(widths[3], abs=1)
    assert widths[0] > 2 * widths[1]


def test_contact_sheet_places_every_picture():
    red = np.zeros((10, 20, 4), dtype=np.uint8)
    red[..., 0], red[..., 3] = 255, 255
    blue = Image.new("RGB", (30, 30), (0, 0, 255))
    sheet = np.asarray(contact_sheet([[red, blue], [None, red]], labels=["a", "b"], captions=["x", "y"], cell=40))
    is_red, is_blue = (sheet == (255, 0, 0)).all(-1), (sheet == (0, 0, 255)).all(-1)
    assert is_red.sum() == 2 * 40 * 20 and is_blue.sum() == 40 * 40  # fitted into the cell, proportions kept
    rows, columns = np.nonzero(is_red)
    assert {(r > 80, c > 44) for r, c in zip(rows, columns, strict=True)} == {(False, False), (True, True)}
    split = np.asarray(contact_sheet([[None, None]], captions=[["", "x"]], cell=40))
    assert (split[:, :46] == 255).all() and (split[:, 46:] < 200).any()  # the second text begins at half the width
    transparent = np.asarray(contact_sheet([[np.zeros((5, 5, 4), np.uint8)]], cell=8))
    assert (transparent == 255).all()


def test_contact_sheet_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="2 labels"):
        contact_sheet([[None, None]], labels=["a"])
    with pytest.raises(ValueError, match="1 captions"):
        contact_sheet([[None]], captions=["a", "b"])


@pytest.mark.parametrize("smooth", [False, True])
def test_depth_and_normals_of_a_ball(smooth):
    ball = trimesh.creation.icosphere(5, radius=2.0)
    vertices = np.asarray(ball.vertices) + np.array([7, 8, 9])
    camera, size = Camera(elevation=20, azimuth=70), 101
    depth, normals = MeshRenderer(vertices, ball.faces, smooth=smooth).depth_and_normals(camera, size)
    picture = MeshRenderer(vertices, ball.faces, smooth=smooth).render(camera, size)
    seen = np.isfinite(depth)
    np.testing.assert_array_equal(seen, picture[..., 3] > 0)
    centre = 2.0 * camera.distance  # from the camera
    assert depth[50, 50] == pytest.approx(centre - 2, rel=1e-3)
    np.testing.assert_allclose(normals[50, 50], [0, 0, 1], atol=0.05)
    # the point behind a pixel, in the camera's axes, and the ball's normal there
    rows, columns = np.nonzero(seen)
    right = ((columns + 0.5) / size * 2 - 1) * camera.half_width * depth[seen]
    up = (1 - (rows + 0.5) / size * 2) * camera.half_width * depth[seen]
    points = np.stack([right, up, centre - depth[seen]], axis=1)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 2, rtol=2e-3)
    np.testing.assert_allclose(normals[seen], points / 2, atol=0.06)
    assert not normals[~seen].any()
