"""The product of pixels under taps that have not moved, and where these lie, against NumPy."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
from tests.runtime.test_matmul import by_dtype, column_counts, in_panels, row_counts, up, vector
from tests.tolerances import assert_close

from deformconv.runtime import cache
from deformconv.runtime.matmul import FEW_ROWS, Panels
from deformconv.runtime.simd import Rows
from deformconv.runtime.window_product import multiply_pixels, place_pixels


@numba.njit(**cache.OPTIONS)
def product(x, width, places, taps, rows, b, depth, c, columns, accumulate):
    multiply_pixels(x, width, places, taps, rows, b, depth, c, columns, accumulate)


@numba.njit(**cache.OPTIONS)
def place(size, shifts, count, origins, tile, places, start):
    place_pixels(size, shifts, count, origins, tile, places, start)


@by_dtype
@pytest.mark.parametrize("accumulate", [False, True])
def test_each_row_is_tap_by_tap_a_pixel_s_channels(dtype: str, accumulate: bool) -> None:
    rng = np.random.default_rng(0)
    taps, channels, width, first_tap, first_channel, pixels = 5, 11, 7, 1, 2, 30
    tile, used = 64, 3
    for rows, columns in itertools.product(row_counts(), column_counts(dtype)):
        x = rng.normal(size=(pixels, width)).astype(dtype)
        places = rng.integers(0, pixels, size=(used, tile)).astype(np.int32)
        b = rng.normal(size=(taps * channels, columns)).astype(dtype)
        room = np.full((up(rows, FEW_ROWS), up(columns, vector(dtype))), 3.0, dtype)
        expected = 3.0 * accumulate + np.zeros((rows, columns))
        for tap, c in itertools.product(range(used), range(width)):
            depth_row = (first_tap + tap) * channels + first_channel + c
            expected += np.outer(x[places[tap, :rows], c].astype("f8"), b[depth_row].astype("f8"))
        panels = Panels(in_panels(b, dtype), 0, taps * channels, 0, first_tap * channels + first_channel)
        into = Rows(room.reshape(-1), 0, room.shape[1])
        product(
            Rows(x.reshape(-1), 0, width), width, Rows(places.reshape(-1), 0, tile), used,
            rows, panels, channels, into, columns, accumulate,
        )  # fmt: skip
        assert_close(room[:rows, :columns], expected, dtype)


@pytest.mark.parametrize("size", [(9,), (4, 5), (3, 4, 2)])
def test_a_tap_outside_is_the_pixel_after_the_last(size: tuple[int, ...]) -> None:
    rng, tile, start = np.random.default_rng(1), 40, 3
    for count in (0, 1, 15, 16, 17, 39):
        origins = rng.integers(-3, 6, size=(len(size), tile)).astype(np.int32)
        shifts = tuple(int(shift) for shift in rng.integers(0, 4, size=len(size)))
        places = np.full(start + tile, -7, np.int32)
        place(size, shifts, count, origins.reshape(-1), tile, places, start)
        at = origins[:, :count] + np.array(shifts)[:, None]
        inside = np.all((at >= 0) & (at < np.array(size)[:, None]), axis=0)
        expected = np.where(inside, np.ravel_multi_index(np.where(inside, at, 0), size), np.prod(size))
        np.testing.assert_array_equal(places[start : start + count], expected)
        assert (np.delete(places, range(start, start + count)) == -7).all()
