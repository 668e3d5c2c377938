"""Colours within faces: corners, textures, and how large a texel is in the picture."""

import numpy as np
import pytest
from PIL import Image

from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.images.srgb import to_bytes, to_linear
from d3ds2.images.surface_colors import PLAIN, SurfaceColors

FLAT = Light(key=0, fill=0, sky=1, ground=1)  # shows the colours themselves


def wall():
    """A square of [-1, 1]², seen from the front, whose uv cover a texture once."""
    vertices = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], dtype=np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return vertices, faces, ((vertices[:, :2] + 1) / 2)[faces]


def look(surface, size=64, radius=1.0, **arguments):
    """Take a picture of the wall whose edges are those of the picture where the radius is 1."""
    vertices, faces, _ = wall()
    renderer = MeshRenderer(vertices, faces)
    renderer.set_surface(surface, **arguments)
    # so far away that the sphere of the radius is as wide as the wall
    camera = Camera(0, 0, focal_mm=1e5, target=(0, 0, 0), radius=radius)
    return renderer.render(camera, size, FLAT).astype(int)


def checks(squares, texels, colors=((255, 0, 0), (0, 0, 255))):
    """A chess board; its lower left square has the first colour."""
    place = np.arange(squares * texels) // texels
    board = np.array(colors, dtype=np.uint8)[(place[::-1, None] + place) % 2]
    return Image.fromarray(board)


def test_each_pixel_has_the_texel_at_its_place():
    _, _, uv = wall()
    white = np.full((2, 3, 3), 255)
    picture = look(SurfaceColors(white, uv, [0, 0], [checks(2, 32)]))
    quarters = [picture[16, 16], picture[16, 48], picture[48, 16], picture[48, 48]]
    assert [tuple(q) for q in quarters] == [(0, 0, 255, 255), (255, 0, 0, 255), (255, 0, 0, 255), (0, 0, 255, 255)]
    mirrored = look(SurfaceColors(white, uv * [-1, 1], [0, 0], [checks(2, 32)]))  # beyond [0, 1]: it repeats
    np.testing.assert_array_equal(mirrored, picture[:, ::-1])
    twice = look(SurfaceColors(white, uv * 2, [0, 0], [checks(2, 32)]))
    assert tuple(twice[8, 8]) == tuple(twice[8, 40]) == tuple(twice[40, 40]) == (0, 0, 255, 255)


def test_a_texel_is_mixed_with_its_neighbours_in_linear_light():
    _, _, uv = wall()
    two = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))  # centres at a quarter of the width
    row = to_linear(look(SurfaceColors(np.full((2, 3, 3), 255), uv, [0, 0], [two]))[32, :, 0].astype(np.uint8))
    expected = np.clip((np.arange(64) + 0.5) / 32 - 0.5, 0, 1)
    np.testing.assert_allclose(row[16:48], expected[16:48], atol=0.01)


def test_corner_colours_run_from_corner_to_corner_and_tint_the_texture():
    _, faces, uv = wall()
    of_vertices = np.array([[0, 0, 0], [255, 0, 0], [255, 0, 0], [0, 0, 0]], dtype=np.uint8)  # black to red, by x
    row = look(SurfaceColors(of_vertices[faces]))[20]
    np.testing.assert_allclose(to_linear(row[:, 0].astype(np.uint8)), (np.arange(64) + 0.5) / 64, atol=0.01)
    assert not row[:, 1:3].any()
    yellow = Image.new("RGB", (4, 4), (255, 255, 0))
    red = SurfaceColors(np.full((2, 3, 3), [255, 0, 0]), uv, [0, PLAIN], [yellow])
    assert {tuple(pixel) for pixel in look(red).reshape(-1, 4)} == {(255, 0, 0, 255)}
    green = look(SurfaceColors(np.full((2, 3, 3), [255, 255, 255]), uv, [PLAIN, 0], [yellow]))
    assert tuple(green[60, 40]) == (255, 255, 255, 255) and tuple(green[4, 20]) == (255, 255, 0, 255)


def test_a_texture_seen_from_afar_is_its_mean_and_does_not_flicker():
    _, _, uv = wall()
    board = checks(256, 2, ((255, 255, 255), (0, 0, 0)))
    picture = look(SurfaceColors(np.full((2, 3, 3), 255), uv, [0, 0], [board]), size=32)
    assert np.ptp(picture[..., 0]) <= 2
    near = look(SurfaceColors(np.full((2, 3, 3), 255), uv, [0, 0], [board]), size=64, radius=0.02)
    assert set(np.unique(near[..., 0])) >= {0, 255}


def test_gain_multiplies_the_channels():
    picture = look(SurfaceColors(np.full((2, 3, 3), 200)), gain=(1.0, 0.5, 0.0))
    r, g, b, _ = picture[30, 30]
    assert (r, b) == (200, 0) and g == to_bytes(to_linear(np.uint8(200)) / 2)


def test_what_does_not_fit_is_refused():
    white, texture = np.full((2, 3, 3), 255), Image.new("RGB", (2, 2))
    with pytest.raises(ValueError, match=r"uv \(F,3,2\)"):
        SurfaceColors(white, np.zeros((3, 3, 2)))
    with pytest.raises(ValueError, match="expected 1 textures, got the number 1"):
        SurfaceColors(white, None, [0, 1], [texture])
    with pytest.raises(ValueError, match="finite uv"):
        SurfaceColors(white, np.full((2, 3, 2), np.nan), [0, 0], [texture])
    vertices, faces, _ = wall()
    with pytest.raises(ValueError, match="colours of 2 faces, got 1"):
        MeshRenderer(vertices, faces).set_surface(SurfaceColors(white[:1]))
