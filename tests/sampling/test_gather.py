"""The array-library form of sampling against the rule, position by position."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tolerances import assert_close

from deformconv.sampling import gather, rule

SIZES = {1: (5,), 2: (3, 4), 3: (2, 3, 4)}
ODD = [np.nan, np.inf, -np.inf, 1e30, rule.REACH, -1.0, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("boundary", ["zeros", "inside"])
@pytest.mark.parametrize("D", [1, 2, 3])
def test_values_follow_the_rule(D: int, boundary: str, dtype: str) -> None:
    random = np.random.default_rng(0)
    pixels = random.normal(size=(2, 3, *SIZES[D])).astype(dtype)
    base = [random.integers(-2, size + 2, (4, 9)) for size in SIZES[D]]
    offset = [random.normal(size=(2, 4, 9)).astype(dtype) for _ in range(D)]
    for axis_offset in offset:
        chosen = random.random(axis_offset.shape) < 0.1
        axis_offset[chosen] = random.choice(ODD, size=int(chosen.sum()))
    samples = gather.interpolate(pixels, base, offset, boundary)
    assert samples.dtype == dtype
    expected = np.empty((2, 4, 9, 3))
    for image, *at in np.ndindex(2, 4, 9):
        position = [axis_base[tuple(at)] for axis_base in base], [o[(image, *at)] for o in offset]
        expected[(image, *at)], _ = rule.interpolate(pixels[image].astype(float), *position, boundary)
    assert_close(samples, expected, dtype)


def test_pixels_outside_are_not_read() -> None:
    """Where an index is moved into the map to be safe, the pixel found there must not count."""
    pixels = np.full((1, 1, 3), np.inf)
    offset = [np.array([[-5.0, -1.0, 2.0, 3.0, 7.0]])]
    with np.errstate(invalid="ignore"):  # inf * 0, for the second
        samples = gather.interpolate(pixels, [np.zeros(5, np.int64)], offset, "zeros")
    np.testing.assert_array_equal(samples.ravel(), [0, np.nan, np.inf, 0, 0])
