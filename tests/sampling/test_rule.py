"""The sampling rule itself, on single positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deformconv.sampling.rule import REACH, base, corners, interpolate, split


def test_base() -> None:
    """Output position 3, stride 2, padding 1, tap 2, dilation 3: pixel 3*2 - 1 + 2*3."""
    assert base(position=3, tap=2, stride=2, padding_before=1, dilation=3) == 11


@given(st.integers(-2000, 2000), st.floats(-1e6, 1e6))
def test_split_keeps_the_position(base: int, offset: float) -> None:
    corner, fraction = split(base, offset)
    assert 0 <= fraction <= 1
    assert (corner - base) + fraction == pytest.approx(offset, abs=1e-9)


def test_split_keeps_the_fraction_of_a_far_pixel() -> None:
    """A float32 sum at 1333 is off by more than 5e-5 here; the fraction is exact."""
    offset = np.float32(0.123456789)
    assert split(1333, offset) == (1333, offset)
    assert abs(float(np.float32(1333) + offset) - 1333 - float(offset)) > 2e-5


@given(st.lists(st.floats(0, 2.99), min_size=1, max_size=3), st.sampled_from(["zeros", "inside"]))
def test_weights_add_up_to_one_inside_the_map(position: list[float], boundary: str) -> None:
    D = len(position)
    found = corners([0] * D, position, [4] * D, boundary)
    assert len(found) == 2**D
    assert sum(corner.weight for corner in found) == pytest.approx(1)
    for axis in range(D):
        assert sum(corner.d_weight[axis] for corner in found) == pytest.approx(0)
        mean = sum(corner.weight * corner.pixel[axis] for corner in found)
        assert mean == pytest.approx(position[axis])


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=2, max_size=2),
    st.sampled_from(["zeros", "inside"]),
)
def test_no_corner_is_outside_the_map(offset: list[float], boundary: str) -> None:
    for corner in corners([1, -1], offset, [3, 2], boundary):
        assert all(0 <= pixel < size for pixel, size in zip(corner.pixel, (3, 2), strict=True))


@pytest.mark.parametrize("offset", [REACH, -REACH, np.inf, -np.inf, 1e300])
def test_out_of_reach_is_outside(offset: float) -> None:
    pixels = np.ones((2, 3, 3))
    value, d_value = interpolate(pixels, [0, 0], [0.5, offset], "zeros")
    assert not value.any()
    assert not d_value.any()


@pytest.mark.parametrize("other", [0.0, -100.0, np.inf, 1e300])
def test_nan_wins_over_outside(other: float) -> None:
    value, d_value = interpolate(np.ones((2, 3, 3)), [0, 0], [other, np.nan], "zeros")
    assert np.isnan(value).all()
    assert np.isnan(d_value).all()


def test_interpolation_by_hand() -> None:
    pixels = np.array([[[1.0, 2.0], [4.0, 8.0]]])
    value, d_value = interpolate(pixels, [0, 1], [0.25, -0.5], "zeros")
    assert value == pytest.approx(0.75 * 1.5 + 0.25 * 6)
    assert d_value[:, 0] == pytest.approx([6 - 1.5, 0.75 * 1 + 0.25 * 4])
