"""The drawing puts the points where the numbers say."""

import numpy as np
import pytest

from deformconv.errors import ShapeError
from deformconv.plots import draw_sampling_points, regular_points, sampling_points

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def axes():
    return figure.Figure().add_subplot()


def random_layer(seed: int = 0):
    random = np.random.default_rng(seed)
    offset, mask = random.normal(size=(1, 18, 5, 6)), random.random((1, 9, 5, 6))
    return sampling_points(offset, 3, stride=2, padding=1)[0, 0], mask[0]


def test_points_are_drawn_in_x_y_order_in_image_pixels(axes):
    points, mask = random_layer()
    at = [(1, 4), (3, 0)]
    drawn = draw_sampling_points(axes, np.zeros((20, 24)), points, mask, at=at, pixel=2, origin=0.5)
    expected = [points[tap, ::-1, row, column] * 2 + 0.5 for tap in range(9) for row, column in at]
    np.testing.assert_allclose(drawn.get_offsets(), expected)
    amounts = [mask[tap, row, column] for tap in range(9) for row, column in at]
    np.testing.assert_allclose(drawn.get_array(), amounts)


def test_without_a_mask_every_point_counts_1(axes):
    points, _ = random_layer()
    drawn = draw_sampling_points(axes, np.ones((9, 9, 3)), points, at=[(0, 0)])
    assert drawn.get_array().tolist() == [1] * 9


def test_the_undeformed_window_is_drawn_around_its_middle(axes):
    points, mask = random_layer()
    regular = regular_points((5, 6), 3, stride=2, padding=1)
    draw_sampling_points(axes, np.zeros((9, 11)), points, mask, at=[(2, 3)], regular=regular)
    assert len(axes.lines) == 9
    for tap, line in enumerate(axes.lines):
        assert line.get_xydata()[0].tolist() == [6, 4]
        np.testing.assert_allclose(line.get_xydata()[1], points[tap, ::-1, 2, 3])
    assert axes.get_xlim() == (-0.5, 10.5) and axes.get_ylim() == (8.5, -0.5)


def test_wrong_shapes_are_explained(axes):
    points, mask = random_layer()
    with pytest.raises(ShapeError, match=r"`points` has shape \(18, 5, 6\); expected \(K, 2, H_out, W_out\)"):
        draw_sampling_points(axes, np.zeros((9, 9)), np.zeros((18, 5, 6)), at=[(0, 0)])
    with pytest.raises(ShapeError, match=r"`mask` has shape \(8, 5, 6\); expected .* \(9, 5, 6\)"):
        draw_sampling_points(axes, np.zeros((9, 9)), points, mask[1:], at=[(0, 0)])
