"""Shaded, depth, normal and mask pictures of a mesh whose pictures can be computed by hand."""

import numpy as np
import pytest
import trimesh

from d3ds2.images.mesh_pictures import FARTHEST, draw_sides


def box(extents) -> tuple[np.ndarray, np.ndarray]:
    solid = trimesh.creation.box(extents)
    faces = np.arange(36).reshape(12, 3)  # flat: no vertex is shared
    return np.asarray(solid.triangles, np.float32).reshape(36, 3), faces


def test_the_front_of_a_box_is_flat_near_and_faces_the_camera():
    (view,) = draw_sides(*box((1, 1, 0.5)), 64, elevation=0)
    inside = view.mask == 1
    assert 0.2 < inside.mean() < 0.6
    for picture, inner, beside in ((view.depth, 1.0, 0.0), (view.normals, (0.5, 0.5, 1.0), (0.5, 0.5, 1.0))):
        assert picture.shape == (64, 64, 3) and picture.dtype == np.float32
        np.testing.assert_allclose(picture[inside], np.broadcast_to(inner, (inside.sum(), 3)), atol=1e-5)
        np.testing.assert_allclose(picture[view.mask == 0], np.broadcast_to(beside, ((view.mask == 0).sum(), 3)))
    assert (view.image[view.mask == 0] == 1).all() and (view.image[inside] < 0.95).all()


def test_sides_go_around():
    views = list(draw_sides(*box((1, 0.2, 0.4)), 64, sides=4, elevation=0))
    widths = [(view.mask.max(0) > 0).sum() for view in views]
    assert widths[0] == widths[2] > 1.5 * widths[1] and widths[1] == widths[3]
    (turned,) = draw_sides(*box((1, 0.2, 0.4)), 64, azimuth=90, elevation=0)
    np.testing.assert_array_equal(turned.depth, views[1].depth)


def test_depth_falls_from_the_nearest_to_the_farthest_point():
    (view,) = draw_sides(*box((1, 1, 1)), 64, azimuth=45, elevation=0)
    seen = view.depth[..., 0] > 0
    assert view.depth.max() == 1 and view.depth[seen].min() == pytest.approx(FARTHEST)
    middle = view.depth[32, seen[32], 0]
    peak = middle.argmax()
    assert (np.diff(middle[: peak + 1]) > 0).all() and (np.diff(middle[peak + 1 :]) < 0).all()
    left, right = view.normals[32, 20], view.normals[32, 44]
    assert left[0] < 0.2 < 0.8 < right[0]  # red: to the right
    (above,) = draw_sides(*box((1, 1, 1)), 64, elevation=60)
    assert above.normals[..., 1].max() == pytest.approx((1 + 0.5) / 2)  # green: up, seen from 60 degrees


@pytest.mark.parametrize(
    ("size", "sides", "azimuth", "message"),
    [
        (64, 10**12, 0.0, "expected 1 to 64 sides of 1 to 4096 pixels, got 1000000000000 of 64"),
        (64, 0, 0.0, "expected 1 to 64 sides"),
        (10**9, 1, 0.0, "1 to 4096 pixels, got 1 of 1000000000"),
        (64, 1, float("nan"), "expected angles up to 360 degrees, got nan and 15.0"),
        (64, 1, float("inf"), "expected angles up to 360 degrees"),
    ],
)
def test_views_out_of_range_are_refused_before_any_is_drawn(size, sides, azimuth, message):
    with pytest.raises(ValueError, match=message):
        draw_sides(np.eye(3), np.array([[0, 1, 2]]), size, sides, azimuth)
