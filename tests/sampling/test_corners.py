"""The compiled sampling, tile by tile, against the rule: tables, values, and the ways back."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from deformconv.runtime.vectors import VECTOR_BYTES
from deformconv.sampling.kernels import blend, differentiate, place_tap, place_tile, pull_back, table_sizes
from tests.tolerances import assert_close

from deformconv.runtime import cache
from deformconv.sampling import rule

by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
by_boundary = pytest.mark.parametrize("boundary", ["zeros", "inside"])
by_rank = pytest.mark.parametrize("D", [1, 2, 3])

ODD = [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -1.0, 0.0, 1.0, 2.0, -0.0, 5.0]
compiled = numba.njit(**cache.OPTIONS)


@compiled
def table(size, geometry, inside, first, count, tap, offset, start, positions, rows, weights, tile):
    place_tile(size, geometry, first, count, rows, tile)
    place_tap(size, geometry, inside, tap, count, offset, start, positions, rows, weights, tile)


@compiled
def read(size, rows, weights, tile, count, x, x_start, row, mask, mask_start, column, start, column_row, width):
    blend(size, rows, weights, tile, count, x, x_start, row, mask, mask_start, column, start, column_row, width)


@compiled
def go_back(
    size, rows, weights, tile, count, x, x_start, row, mask, mask_start, column, d_column, start, column_row,
    d_x, d_x_start, scatter, width, d_offset, d_offset_start, positions, d_mask, d_mask_start,
):  # fmt: skip
    pull_back(
        size, rows, weights, tile, count, x, x_start, row, mask, mask_start, column, d_column, start, column_row,
        d_x, d_x_start, scatter, width,
    )  # fmt: skip
    differentiate(
        size, weights, tile, count, mask, mask_start, d_offset, d_offset_start, positions, d_mask, d_mask_start
    )  # fmt: skip


def vector(dtype: str) -> int:
    """How many numbers a vector holds."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


class Window(NamedTuple):
    """A window that leaves the map on every side, and its rows of `geometry`."""

    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]
    output: tuple[int, ...]

    @classmethod
    def of_rank(cls, D: int) -> Window:
        input, output = {1: ((40,), (37,)), 2: ((5, 6), (5, 7)), 3: ((4, 3, 5), (3, 5, 7))}[D]
        return cls(input, (2, 1, 3)[-D:], (1, 2, 1)[-D:], (1, 0, 2)[-D:], (2, 1, 1)[-D:], output)

    @property
    def geometry(self) -> np.ndarray:
        return np.array(self, np.int64)

    @property
    def positions(self) -> int:
        return int(np.prod(self.output))

    @property
    def pixels(self) -> int:
        return int(np.prod(self.input))

    def base(self, position: int, tap: int) -> list[int]:
        places, taps = np.unravel_index(position, self.output), np.unravel_index(tap, self.kernel)
        return [
            rule.base(int(place), int(step), stride, before, dilation)
            for place, step, stride, before, dilation in zip(places, taps, self.stride, self.before, self.dilation, strict=True)
        ]


class Tile:
    """A tile of a tap's samples: random offsets, odd ones strewn in, and the table that is made of them.

    Memory that the kernels have to write is full of NaN, or of a row that does not exist.
    """

    def __init__(self, D: int, dtype: str, boundary: str, count: int, tap: int = 1) -> None:
        self.window, self.dtype, self.boundary, self.count, self.tap = Window.of_rank(D), dtype, boundary, count, tap
        random = np.random.default_rng(count)
        self.size, self.axes, self.corners = count + 3, D, 1 << D
        self.first = self.window.positions - count  # the tile ends with the image
        offset = 1.5 * random.normal(size=(D, self.window.positions))
        chosen = random.random(offset.shape) < 0.2
        offset[chosen] = random.choice(ODD, size=int(chosen.sum()))
        self.offset = offset.astype(dtype)
        integers, reals = table_sizes(D, self.size)
        self.rows, self.weights = np.full(integers, 2**30, np.int32), np.full(reals, np.nan, dtype)
        flat = np.concatenate([[99], self.offset.ravel()]).astype(dtype)
        table(
            self.window.input, self.window.geometry, boundary == "inside", self.first, count, tap, flat, 1 + self.first,
            self.window.positions, self.rows, self.weights, self.size,
        )  # fmt: skip

    def run(self, array: np.ndarray, number: int) -> np.ndarray:
        """A run of the table, one number a position of the tile."""
        return array[number * self.size : number * self.size + self.count]

    def sample(self, t: int) -> tuple[list[int], list[float]]:
        """Where the tile's position `t` reads: its base, and the offset of each axis."""
        return self.window.base(self.first + t, self.tap), [float(o) for o in self.offset[:, self.first + t]]

    def read(self, pixels: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """What the rule reads there of pixels (P, C): the value (C,) and its derivatives (D, C)."""
        image = pixels.astype("float64").T.reshape(-1, *self.window.input)
        return rule.interpolate(image, *self.sample(t), self.boundary)


def counts(dtype: str, D: int) -> list[int]:
    """Numbers of positions around a vector's, as many as an image of the window has."""
    lanes = vector(dtype)
    most = Window.of_rank(D).positions
    return sorted({min(count, most) for count in (1, lanes - 1, lanes, lanes + 1, 2 * lanes + 3)})


def widths(dtype: str) -> list[int]:
    lanes = vector(dtype)
    return sorted({1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes + lanes // 2 + 1})


def test_the_table_has_room_for_rows_origins_weights_fractions_and_dot_products() -> None:
    for D in (1, 2, 3):
        assert table_sizes(D, 10) == ((2**D + D) * 10, (2 * 2**D + D) * 10)


@by_rank
@by_dtype
@by_boundary
def test_a_table_is_the_rule(boundary: str, dtype: str, D: int) -> None:
    for count, tap in product(counts(dtype, D), range(int(np.prod(Window.of_rank(D).kernel)))):
        tile = Tile(D, dtype, boundary, count, tap)
        for t in range(count):
            base, offset = tile.sample(t)
            origins = [int(tile.run(tile.rows, tile.corners + axis)[t]) for axis in range(D)]
            assert origins == tile.window.base(tile.first + t, 0)
            expected: dict[int, float] = {}
            for corner in rule.corners(base, offset, tile.window.input, boundary):
                row = int(np.ravel_multi_index(corner.pixel, tile.window.input))
                expected[row] = expected.get(row, 0) + corner.weight
            found: dict[int, float] = {}
            weights = [float(tile.run(tile.weights, corner)[t]) for corner in range(tile.corners)]
            for corner, weight in enumerate(weights):
                row = int(tile.run(tile.rows, corner)[t])
                if row != tile.window.pixels:  # the row of zeros, for all that is outside
                    found[row] = found.get(row, 0) + weight
            assert found.keys() == expected.keys(), (base, offset)
            assert_close(list(found.values()), [expected[row] for row in found], dtype)
            none = any(map(np.isnan, offset))
            assert np.isnan(weights).all() if none else np.isfinite(weights).all()
        # Beyond the tile nothing is written.
        for runs, fill in ((tile.rows, 2**30), (tile.weights, np.nan)):
            beyond = runs.reshape(-1, tile.size)[:, count:]
            np.testing.assert_array_equal(beyond, np.full_like(beyond, fill))


@by_rank
@by_dtype
def test_fractions_are_those_of_the_offsets(dtype: str, D: int) -> None:
    """They are exact: base and offset are never added. A coordinate that is none stays so; one out of reach has 0."""
    tile = Tile(D, dtype, "zeros", counts(dtype, D)[-1])
    for axis in range(D):
        offset = tile.offset[axis, tile.first :]
        near = np.abs(offset) < 2.0**30
        fraction = np.where(near, np.where(near, offset, 0) - np.floor(np.where(near, offset, 0)), 0)
        expected = np.where(np.isnan(offset), np.nan, fraction).astype(dtype)
        np.testing.assert_array_equal(tile.run(tile.weights, tile.corners + axis), expected)


class Arrays:
    """Pixels, channels last, their row of zeros after them, and a border around all that a kernel reads or writes."""

    def __init__(self, tile: Tile, width: int, masked: bool) -> None:
        random = np.random.default_rng(width)
        dtype = tile.dtype
        self.width, self.row, self.column_row, self.start, self.x_start = width, width + 2, width + 1, 3, 5
        self.pixels = random.normal(size=(tile.window.pixels, width)).astype(dtype)
        rows = np.zeros((tile.window.pixels + 1, self.row), dtype)
        rows[:-1, :width] = self.pixels
        rows[:, width:] = np.nan  # another block's channels
        self.x = np.concatenate([np.full(self.x_start, np.nan), rows.ravel()]).astype(dtype)
        self.d_values = random.normal(size=(tile.count, width)).astype(dtype)
        self.d_column = self.empty(tile)
        self.part(self.d_column)[:] = self.d_values
        self.column = self.empty(tile)
        masks = random.uniform(-0.5, 1.5, tile.count).astype(dtype)
        self.masks = masks.astype("float64") if masked else np.ones(tile.count)
        self.mask = np.concatenate([[np.nan], masks]).astype(dtype) if masked else np.empty(0, dtype)
        self.mask_start = 1 if masked else 0

    def empty(self, tile: Tile) -> np.ndarray:
        return np.full(self.start + tile.count * self.column_row, 7, tile.dtype)

    def part(self, column: np.ndarray) -> np.ndarray:
        """The rows of a column that belong to the channels."""
        return column[self.start :].reshape(-1, self.column_row)[:, : self.width]

    def check_column(self, tile: Tile, what: str) -> None:
        values = np.stack([tile.read(self.pixels, t)[0] for t in range(tile.count)])
        with np.errstate(invalid="ignore"):
            assert_close(self.part(self.column), self.masks[:, None] * values, tile.dtype, what)
        beside = self.column.copy()
        self.part(beside)[:] = 7
        np.testing.assert_array_equal(beside, np.full_like(beside, 7), what)


@by_rank
@by_dtype
@by_boundary
@pytest.mark.parametrize("masked", [True, False])
def test_values_are_the_rules(masked: bool, boundary: str, dtype: str, D: int) -> None:
    tile = Tile(D, dtype, boundary, counts(dtype, D)[-1])
    for width in widths(dtype):
        a = Arrays(tile, width, masked)
        read(
            tile.window.input, tile.rows, tile.weights, tile.size, tile.count, a.x, a.x_start, a.row, a.mask, a.mask_start,
            a.column, a.start, a.column_row, width,
        )  # fmt: skip
        a.check_column(tile, f"width {width}")


@by_dtype
def test_an_infinite_mask_makes_no_nan_of_a_weight_of_0(dtype: str) -> None:
    size, geometry = (3,), np.array([[3], [1], [1], [0], [1], [3]], np.int64)
    rows, weights = (np.empty(number, kind) for number, kind in zip(table_sizes(1, 3), (np.int32, dtype), strict=True))
    table(size, geometry, False, 0, 3, 0, np.zeros(3, dtype), 0, 3, rows, weights, 3)  # on the pixels: the high corner's is 0
    x, column = np.array([1, 2, 3, 0], dtype), np.empty(3, dtype)
    read(size, rows, weights, 3, 3, x, 0, 1, np.array([np.inf, np.nan, -np.inf], dtype), 0, column, 0, 1, 1)
    np.testing.assert_array_equal(column, [np.inf, np.nan, -np.inf])


@by_rank
@by_dtype
@by_boundary
@pytest.mark.parametrize("masked", [True, False])
def test_the_ways_back_are_the_rules_derivatives(masked: bool, boundary: str, dtype: str, D: int) -> None:
    for width, count in zip(widths(dtype), counts(dtype, D) * 2, strict=False):
        tile = Tile(D, dtype, boundary, count)
        a = Arrays(tile, width, masked)
        d_x_start, offset_pitch = 2, count + 4
        d_x = np.full(d_x_start + (tile.window.pixels + 1) * a.row, 3, dtype)
        d_offset, d_mask = np.full(1 + D * offset_pitch, 7, dtype), np.full(count + 2, 7, dtype)
        arguments: list[Any] = [
            tile.window.input, tile.rows, tile.weights, tile.size, count, a.x, a.x_start, a.row, a.mask, a.mask_start,
            a.column, a.d_column, a.start, a.column_row, d_x, d_x_start, True, width, d_offset, 1, offset_pitch, d_mask, 1,
        ]  # fmt: skip
        go_back(*arguments)
        what = f"width {width}, {count} positions"
        a.check_column(tile, what)

        read_there = [tile.read(a.pixels, t) for t in range(count)]
        d_values = a.d_values.astype("float64")
        expected_mask = np.array([d @ value for d, (value, _) in zip(d_values, read_there, strict=True)])
        slopes = np.stack([d_value @ d for d, (_, d_value) in zip(d_values, read_there, strict=True)], axis=1)
        found = d_offset[1:].reshape(D, offset_pitch)
        assert_close(found[:, :count], a.masks * slopes, dtype, f"d_offset, {what}")
        assert_close(d_mask[1:-1], expected_mask, dtype, f"d_mask, {what}")
        assert d_offset[0] == d_mask[0] == d_mask[-1] == 7 and (found[:, count:] == 7).all()

        # Of a position that is none, which only the row of zeros gets, d_x has nothing.
        expected_x = np.full((tile.window.pixels, width), 3.0)
        for t in range(count):
            for corner in rule.corners(*tile.sample(t), tile.window.input, boundary):
                row = np.ravel_multi_index(corner.pixel, tile.window.input)
                expected_x[row] += a.masks[t] * corner.weight * d_values[t]
        rows = d_x[d_x_start:].reshape(-1, a.row)
        assert_close(rows[:-1, :width], expected_x, dtype, f"d_x, {what}")
        assert (rows[:, width:] == 3).all() and (d_x[:d_x_start] == 3).all()

        # What is not wanted is not written, and changes nothing of the rest.
        kept_x, kept_offset = d_x.copy(), d_offset.copy()
        nothing = np.empty(0, dtype)
        go_back(*arguments[:16], False, width, d_offset, 1, offset_pitch, nothing, 0)
        np.testing.assert_array_equal(d_x, kept_x)
        np.testing.assert_array_equal(d_offset, kept_offset)
        kept_mask = d_mask.copy()
        go_back(*arguments[:16], False, width, nothing, 0, offset_pitch, d_mask, 1)
        np.testing.assert_array_equal(d_mask, kept_mask)


@by_dtype
def test_two_corners_may_be_one_pixel(dtype: str) -> None:
    """Beyond the last pixel, "inside" reads it twice: with weight 1 and with weight 0."""
    size, geometry = (2,), np.array([[2], [1], [1], [0], [1], [1]], np.int64)
    rows, weights = (np.empty(number, kind) for number, kind in zip(table_sizes(1, 1), (np.int32, dtype), strict=True))
    table(size, geometry, True, 0, 1, 0, np.array([1.75], dtype), 0, 1, rows, weights, 1)
    assert rows[:2].tolist() == [1, 1] and weights[:2].tolist() == [1, 0]
    x, d_x, column, d_column, d_offset, d_mask, ones = (np.array(values, dtype) for values in (
        [5, 6, 0], [0, 0, 0], [0], [2], [9], [9], [],
    ))  # fmt: skip
    go_back(
        size, rows, weights, 1, 1, x, 0, 1, ones, 0, column, d_column, 0, 1, d_x, 0, True, 1, d_offset, 0, 1, d_mask, 0
    )  # fmt: skip
    assert (column.tolist(), d_x.tolist(), d_offset.tolist(), d_mask.tolist()) == ([6], [0, 2, 0], [0], [12])
