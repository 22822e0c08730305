"""Where the taps sample, against positions written out by hand."""

import numpy as np
import pytest

from deformconv.errors import ShapeError
from deformconv.plots import regular_points, sampling_points


def test_the_order_of_the_offsets_is_group_then_tap_then_axis():
    offset = np.arange(2 * 4 * 2, dtype=float).reshape(1, 16, 1, 1)
    points = sampling_points(offset, 2, offset_groups=2)[0, :, :, :, 0, 0]
    assert points.tolist() == [
        [[0 + 0, 0 + 1], [0 + 2, 1 + 3], [1 + 4, 0 + 5], [1 + 6, 1 + 7]],
        [[0 + 8, 0 + 9], [0 + 10, 1 + 11], [1 + 12, 0 + 13], [1 + 14, 1 + 15]],
    ]


def test_a_2d_window_with_a_parameter_of_its_own_on_every_axis():
    points = regular_points((3, 4), (2, 3), stride=(2, 3), padding=((1, 0), (2, 5)), dilation=(4, 2))
    assert points.shape == (6, 2, 3, 4)
    # Position (2, 1): y = 2*2 - 1 + {0, 4}, x = 1*3 - 2 + {0, 2, 4}.
    assert points[:, :, 2, 1].tolist() == [[3, 1], [3, 3], [3, 5], [7, 1], [7, 3], [7, 5]]
    # Position (0, 0) begins in the padding.
    assert points[0, :, 0, 0].tolist() == [-1, -2]


def test_zero_offsets_sample_at_the_regular_points_of_every_image_and_group():
    window = {"stride": 2, "padding": 1, "dilation": 3}
    points = sampling_points(np.zeros((2, 3 * 9 * 2, 4, 5)), 3, offset_groups=3, **window)
    assert points.shape == (2, 3, 9, 2, 4, 5)
    assert (points == regular_points((4, 5), 3, **window)).all()


def test_an_offset_moves_its_own_tap_at_its_own_position_alone():
    offset = np.zeros((1, 18, 4, 4), np.float32)
    offset[0, 2 * 7, 1, 3] = -0.25  # tap 7 is row 2, column 1 of the kernel; dy
    moved = sampling_points(offset, 3, padding=1) - sampling_points(np.zeros_like(offset), 3, padding=1)
    assert np.argwhere(moved).tolist() == [[0, 0, 7, 0, 1, 3]]
    assert sampling_points(offset, 3, padding=1)[0, 0, 7, :, 1, 3].tolist() == [1 - 1 + 2 - 0.25, 3 - 1 + 1]


def test_one_and_three_axes():
    assert regular_points((3,), 3, stride=2, padding=1)[:, 0].tolist() == [[-1, 1, 3], [0, 2, 4], [1, 3, 5]]
    offset = np.zeros((1, 2 * 3, 1, 1, 1))
    offset[0, 3:, 0, 0, 0] = 0.1, 0.2, 0.3  # tap 1
    points = sampling_points(offset, (1, 1, 2), padding=((3, 0), (2, 0), (1, 0)))
    np.testing.assert_allclose(points[0, 0, :, :, 0, 0, 0], [[-3, -2, -1], [-2.9, -1.8, 0.3]])


def test_same_and_valid_padding():
    assert (regular_points((5, 5), 3, padding="same") == regular_points((5, 5), 3, padding=1)).all()
    assert (regular_points((5, 5), 3, padding="valid") == regular_points((5, 5), 3)).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 27, 4, 4), "27 channels; expected 1 offset group x 9 taps x 2 axes = 18 for a 3x3 kernel"),
        ((18,), r"has 1 axis, shape \(18,\)"),
        ((1, 18), "2 axes"),
    ],
)
def test_a_wrong_offset_is_explained(shape, message):
    with pytest.raises(ShapeError, match=message):
        sampling_points(np.zeros(shape), 3)
