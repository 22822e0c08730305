"""The sampling rule itself, on single positions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deformconv.sampling.rule import BOUNDARIES, REACH, base, check_boundary, corners, interpolate, interpolate_at, split


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


COORDINATES = [-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 2.75, 3.0, 1e30, -REACH, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_absolute_position_is_an_offset_from_any_pixel(boundary: str) -> None:
    """These coordinates and their differences from pixel 5 are exact, so that both forms give the same bits."""
    pixels = np.random.default_rng(0).normal(size=(2, 3, 3))
    for position in product(COORDINATES, repeat=2):
        whole = interpolate_at(pixels, position, boundary)
        split_up = interpolate(pixels, [5, -3], [position[0] - 5, position[1] + 3], boundary)
        for one, other in zip(whole, split_up, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("D", [1, 2, 3])
def test_derivatives_at_an_absolute_position_are_finite_differences(D: int, boundary: str) -> None:
    random, step = np.random.default_rng(D), 1e-6
    pixels = random.normal(size=(2, *(4, 3, 5)[:D]))
    found = 0
    for _ in range(100):
        position = random.uniform(-1.5, 5.5, D)
        if np.abs(position - np.round(position)).min() < 1e-3:
            continue  # beside a kink
        _, d_value = interpolate_at(pixels, position.tolist(), boundary)
        for axis in range(D):
            there, back = position.copy(), position.copy()
            there[axis] += step
            back[axis] -= step
            values = [interpolate_at(pixels, at.tolist(), boundary)[0] for at in (there, back)]
            np.testing.assert_allclose(d_value[axis], (values[0] - values[1]) / (2 * step), atol=1e-8)
            found += bool(d_value[axis].any())
    assert found > 20


def test_unknown_boundaries() -> None:
    for boundary in BOUNDARIES:
        check_boundary(boundary)
    with pytest.raises(ValueError, match=r"^`boundary` is 'border'; expected 'zeros' or 'inside', or None for a reason\.$"):
        check_boundary("border", ", or None for a reason")
