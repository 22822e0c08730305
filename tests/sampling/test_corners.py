"""The compiled sampling, tile by tile, against the rule: tables, values, and the ways back."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numba
import numpy as np
import pytest
from tests.tolerances import assert_close

from deformconv.runtime import cache
from deformconv.runtime.simd import VECTOR_BYTES, Rows
from deformconv.sampling import rule
from deformconv.sampling.corners import Table, blend, differentiate, place_at, pull_back, table_in, table_sizes
from deformconv.sampling.windows import place_tap, place_tile

by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
by_boundary = pytest.mark.parametrize("boundary", ["zeros", "inside"])
by_rank = pytest.mark.parametrize("D", [1, 2, 3])

ODD = [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -1.0, 0.0, 1.0, 2.0, -0.0, 5.0]
compiled = numba.njit(**cache.OPTIONS)


@compiled
def fill_within(size, tile, integers, reals):
    table = table_in(size, tile, integers, reals)
    table.rows[:] = table.tile
    table.weights[:] = table.tile


@compiled
def fill_table(size, geometry, inside, first, count, tap, offset, table):
    place_tile(size, geometry, first, count, table)
    place_tap(size, geometry, inside, tap, count, offset, table)


@compiled
def fill_table_at(size, inside, count, position, table):
    place_at(size, inside, count, position, table)


@compiled
def read(size, table, count, x, mask, mask_start, column, width):
    blend(size, table, count, x, mask, mask_start, column, width)


@compiled
def go_back(size, table, count, x, mask, mask_start, column, d_column, d_x, width, d_offset, d_mask, d_mask_start):
    pull_back(size, table, count, x, mask, mask_start, column, d_column, d_x, width)
    differentiate(size, table, count, mask, mask_start, d_offset, d_mask, d_mask_start)


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


def unwritten_table(D: int, tile: int, dtype: str) -> Table:
    """A table full of NaN, and of a row that does not exist."""
    integers, reals = table_sizes(D, tile)
    return Table(np.full(integers, 2**30, np.int32), np.full(reals, np.nan, dtype), tile)


class Tile:
    """A tile of a tap's samples: random offsets, odd ones strewn in, and the table that is made of them."""

    def __init__(self, D: int, dtype: str, boundary: str, count: int, tap: int = 1) -> None:
        self.window, self.dtype, self.boundary, self.count, self.tap = Window.of_rank(D), dtype, boundary, count, tap
        random = np.random.default_rng(count)
        self.corners = 1 << D
        self.first = self.window.positions - count  # the tile ends with the image
        offset = 1.5 * random.normal(size=(D, self.window.positions))
        chosen = random.random(offset.shape) < 0.2
        offset[chosen] = random.choice(ODD, size=int(chosen.sum()))
        self.offset = offset.astype(dtype)
        self.table = unwritten_table(D, count + 3, dtype)
        flat = np.concatenate([[99], self.offset.ravel()]).astype(dtype)
        rows = Rows(flat, 1 + self.first, self.window.positions)
        fill_table(self.window.input, self.window.geometry, boundary == "inside", self.first, count, tap, rows, self.table)

    def run(self, array: np.ndarray, number: int) -> np.ndarray:
        """A run of the table, one number a position of the tile."""
        return array[number * self.table.tile :][: self.count]

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
        memory = np.zeros(200, np.int32), np.zeros(200)
        fill_within((5,) * D, 10, *memory)
        for array, size in zip(memory, table_sizes(D, 10), strict=True):
            assert array.tolist() == [10] * size + [0] * (200 - size)


@by_rank
@by_dtype
@by_boundary
def test_a_table_is_the_rule(boundary: str, dtype: str, D: int) -> None:
    for count, tap in product(counts(dtype, D), range(int(np.prod(Window.of_rank(D).kernel)))):
        tile = Tile(D, dtype, boundary, count, tap)
        for t in range(count):
            base, offset = tile.sample(t)
            origins = [int(tile.run(tile.table.rows, tile.corners + axis)[t]) for axis in range(D)]
            assert origins == tile.window.base(tile.first + t, 0)
            expected: dict[int, float] = {}
            for corner in rule.corners(base, offset, tile.window.input, boundary):
                row = int(np.ravel_multi_index(corner.pixel, tile.window.input))
                expected[row] = expected.get(row, 0) + corner.weight
            found: dict[int, float] = {}
            weights = [float(tile.run(tile.table.weights, corner)[t]) for corner in range(tile.corners)]
            for corner, weight in enumerate(weights):
                row = int(tile.run(tile.table.rows, corner)[t])
                if row != tile.window.pixels:  # the row of zeros, for all that is outside
                    found[row] = found.get(row, 0) + weight
            assert found.keys() == expected.keys(), (base, offset)
            assert_close(list(found.values()), [expected[row] for row in found], dtype)
            none = any(map(np.isnan, offset))
            assert np.isnan(weights).all() if none else np.isfinite(weights).all()
        # Beyond the tile nothing is written.
        for runs, fill in ((tile.table.rows, 2**30), (tile.table.weights, np.nan)):
            beyond = runs.reshape(-1, tile.table.tile)[:, count:]
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
        np.testing.assert_array_equal(tile.run(tile.table.weights, tile.corners + axis), expected)


@by_rank
@by_dtype
@by_boundary
def test_a_table_of_absolute_positions_is_the_rule(boundary: str, dtype: str, D: int) -> None:
    size, random = (5, 4, 3)[:D], np.random.default_rng(D)
    count, pixels = 2 * vector(dtype) + 3, int(np.prod(size))
    position = random.uniform(-2, 7, (D, count)).astype(dtype)
    chosen = random.random(position.shape) < 0.3
    position[chosen] = random.choice(ODD, size=int(chosen.sum()))
    table = unwritten_table(D, count, dtype)
    fill_table_at(size, boundary == "inside", count, Rows(position.ravel(), 0, count), table)
    image = random.normal(size=(2, *size))
    rows = np.concatenate([image.reshape(2, pixels), np.zeros((2, 1))], axis=1)  # the last is all that is outside
    corners = 1 << D
    for t in range(count):
        expected, _ = rule.interpolate_at(image, [float(coordinate) for coordinate in position[:, t]], boundary)
        found = sum(
            float(table.weights[corner * count + t]) * rows[:, table.rows[corner * count + t]] for corner in range(corners)
        )
        assert_close(found, expected, dtype)


class Arrays:
    """Pixels, channels last, their row of zeros after them, and a border around all that a kernel reads or writes."""

    def __init__(self, tile: Tile, width: int, masked: bool) -> None:
        random = np.random.default_rng(width)
        dtype = tile.dtype
        self.width, start, row = width, 5, width + 2
        self.pixels = random.normal(size=(tile.window.pixels, width)).astype(dtype)
        rows = np.zeros((tile.window.pixels + 1, row), dtype)
        rows[:-1, :width] = self.pixels
        rows[:, width:] = np.nan  # another block's channels
        self.x = Rows(np.concatenate([np.full(start, np.nan), rows.ravel()]).astype(dtype), start, row)
        self.d_values = random.normal(size=(tile.count, width)).astype(dtype)
        self.d_column = self.empty(tile)
        self.part(self.d_column)[:] = self.d_values
        self.column = self.empty(tile)
        masks = random.uniform(-0.5, 1.5, tile.count).astype(dtype)
        self.masks = masks.astype("float64") if masked else np.ones(tile.count)
        self.mask = np.concatenate([[np.nan], masks]).astype(dtype) if masked else np.empty(0, dtype)
        self.mask_start = 1 if masked else 0

    def empty(self, tile: Tile) -> Rows:
        start, row = 3, self.width + 1
        return Rows(np.full(start + tile.count * row, 7, tile.dtype), start, row)

    def part(self, column: Rows) -> np.ndarray:
        """What of a column belongs to the channels."""
        return column.array[column.start :].reshape(-1, column.row)[:, : self.width]

    def check_column(self, tile: Tile, what: str) -> None:
        values = np.stack([tile.read(self.pixels, t)[0] for t in range(tile.count)])
        with np.errstate(invalid="ignore"):
            assert_close(self.part(self.column), self.masks[:, None] * values, tile.dtype, what)
        beside = self.column._replace(array=self.column.array.copy())
        self.part(beside)[:] = 7
        np.testing.assert_array_equal(beside.array, np.full_like(beside.array, 7), what)


@by_rank
@by_dtype
@by_boundary
@pytest.mark.parametrize("masked", [True, False])
def test_values_are_the_rules(masked: bool, boundary: str, dtype: str, D: int) -> None:
    tile = Tile(D, dtype, boundary, counts(dtype, D)[-1])
    for width in widths(dtype):
        a = Arrays(tile, width, masked)
        read(tile.window.input, tile.table, tile.count, a.x, a.mask, a.mask_start, a.column, width)
        a.check_column(tile, f"width {width}")


@by_dtype
def test_an_infinite_mask_makes_no_nan_of_a_weight_of_0(dtype: str) -> None:
    size, geometry = (3,), np.array([[3], [1], [1], [0], [1], [3]], np.int64)
    table, offset = unwritten_table(1, 3, dtype), Rows(np.zeros(3, dtype), 0, 3)
    fill_table(size, geometry, False, 0, 3, 0, offset, table)  # on the pixels: the high corner's is 0
    x, column = np.array([1, 2, 3, 0], dtype), np.empty(3, dtype)
    mask = np.array([np.inf, np.nan, -np.inf], dtype)
    read(size, table, 3, Rows(x, 0, 1), mask, 0, Rows(column, 0, 1), 1)
    np.testing.assert_array_equal(column, [np.inf, np.nan, -np.inf])


@by_rank
@by_dtype
@by_boundary
@pytest.mark.parametrize("masked", [True, False])
def test_the_ways_back_are_the_rules_derivatives(masked: bool, boundary: str, dtype: str, D: int) -> None:
    for width, count in zip(widths(dtype), counts(dtype, D) * 2, strict=False):
        tile = Tile(D, dtype, boundary, count)
        a = Arrays(tile, width, masked)
        pitch = count + 4
        d_x = Rows(np.full(2 + (tile.window.pixels + 1) * a.x.row, 3, dtype), 2, a.x.row)
        d_offset, d_mask = Rows(np.full(1 + D * pitch, 7, dtype), 1, pitch), np.full(count + 2, 7, dtype)
        operands = tile.window.input, tile.table, count, a.x, a.mask, a.mask_start, a.column, a.d_column
        go_back(*operands, d_x, width, d_offset, d_mask, 1)
        what = f"width {width}, {count} positions"
        a.check_column(tile, what)

        read_there = [tile.read(a.pixels, t) for t in range(count)]
        d_values = a.d_values.astype("float64")
        expected_mask = np.array([d @ value for d, (value, _) in zip(d_values, read_there, strict=True)])
        slopes = np.stack([d_value @ d for d, (_, d_value) in zip(d_values, read_there, strict=True)], axis=1)
        found = d_offset.array[1:].reshape(D, pitch)
        assert_close(found[:, :count], a.masks * slopes, dtype, f"d_offset, {what}")
        assert_close(d_mask[1:-1], expected_mask, dtype, f"d_mask, {what}")
        assert d_offset.array[0] == d_mask[0] == d_mask[-1] == 7 and (found[:, count:] == 7).all()

        # Of a position that is none, which only the row of zeros gets, d_x has nothing.
        expected_x = np.full((tile.window.pixels, width), 3.0)
        for t in range(count):
            for corner in rule.corners(*tile.sample(t), tile.window.input, boundary):
                row = np.ravel_multi_index(corner.pixel, tile.window.input)
                expected_x[row] += a.masks[t] * corner.weight * d_values[t]
        rows = d_x.array[2:].reshape(-1, d_x.row)
        assert_close(rows[:-1, :width], expected_x, dtype, f"d_x, {what}")
        assert (rows[:, width:] == 3).all() and (d_x.array[:2] == 3).all()

        # What is not wanted is not written, and changes nothing of the rest. The kernels get an empty part of a result that is
        # not wanted, so that the result shows what they write there nevertheless.
        kept_x, kept_offset, kept_mask = d_x.array.copy(), d_offset.array.copy(), d_mask.copy()
        no_x, no_offset = d_x._replace(array=d_x.array[:0]), d_offset._replace(array=d_offset.array[:0])
        for array in (d_offset.array, d_mask, a.column.array):
            array.fill(7)
        go_back(*operands, no_x, width, d_offset, d_mask[:0], 1)
        np.testing.assert_array_equal(d_offset.array, kept_offset)
        assert (d_mask == 7).all()
        d_offset.array.fill(7)
        go_back(*operands, no_x, width, no_offset, d_mask, 1)
        np.testing.assert_array_equal(d_mask, kept_mask)
        assert (d_offset.array == 7).all()
        np.testing.assert_array_equal(d_x.array, kept_x)
        a.check_column(tile, what)


@by_dtype
def test_two_corners_may_be_one_pixel(dtype: str) -> None:
    """Beyond the last pixel, "inside" reads it twice: with weight 1 and with weight 0."""
    size, geometry = (2,), np.array([[2], [1], [1], [0], [1], [1]], np.int64)
    table = unwritten_table(1, 1, dtype)
    fill_table(size, geometry, True, 0, 1, 0, Rows(np.array([1.75], dtype), 0, 1), table)
    assert table.rows[:2].tolist() == [1, 1] and table.weights[:2].tolist() == [1, 0]
    x, d_x, column, d_column, d_offset, d_mask, ones = (np.array(values, dtype) for values in (
        [5, 6, 0], [0, 0, 0], [0], [2], [9], [9], [],
    ))  # fmt: skip
    rows = (Rows(array, 0, 1) for array in (column, d_column, d_x))
    go_back(size, table, 1, Rows(x, 0, 1), ones, 0, *rows, 1, Rows(d_offset, 0, 1), d_mask, 0)
    assert (column.tolist(), d_x.tolist(), d_offset.tolist(), d_mask.tolist()) == ([6], [0, 2, 0], [0], [12])
