"""The matrix product inside the kernels, against NumPy's: rests of rows, columns and depth, and the forms of A and B."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
from tests.tolerances import assert_close

from deformconv.runtime import cache
from deformconv.runtime.matmul import BLOCK, FEW_ROWS, ROWS, VECTORS, Factor, Panels, multiply
from deformconv.runtime.simd import VECTOR_BYTES, Rows

by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


@numba.njit(**cache.OPTIONS)
def product(a, rows, b, c, columns, accumulate):
    multiply(a, rows, b, c, columns, accumulate)


def up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def vector(dtype: str) -> int:
    """How many numbers a vector holds."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def row_counts() -> list[int]:
    return sorted({0, 1, FEW_ROWS, FEW_ROWS + 1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + FEW_ROWS + 1})


def column_counts(dtype: str) -> list[int]:
    lanes, panel = vector(dtype), VECTORS * vector(dtype)
    return sorted({1, lanes - 1, lanes, lanes + 1, panel, panel + 1, 2 * panel, 2 * panel + lanes + 1})


def matrix(rows: int, columns: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(dtype)


def in_panels(b: np.ndarray, dtype: str) -> np.ndarray:
    """B as `multiply` describes it, with NaN in the columns that fill the last panel up."""
    (depth, columns), lanes = b.shape, vector(dtype)
    panels = []
    for column in range(0, columns, VECTORS * lanes):
        part = b[:, column : column + VECTORS * lanes]
        panel = np.full((depth, lanes if part.shape[1] <= lanes else VECTORS * lanes), np.nan, dtype)
        panel[:, : part.shape[1]] = part
        panels.append(panel.ravel())
    return np.concatenate(panels)


class Result:
    """Memory for C with a border that must stay as it is, and what `multiply` may write on its way."""

    def __init__(self, rows: int, columns: int, dtype: str, fill: float) -> None:
        self.rows, self.columns = rows, columns
        self.room = up(rows % ROWS, FEW_ROWS) + rows // ROWS * ROWS, up(columns, vector(dtype))
        start, row = 3, self.room[1] + 2
        self.memory = Rows(np.full(start + (self.room[0] + 2) * row, fill, dtype), start, row)

    def check(self, expected: np.ndarray, fill: float, dtype: str, what: str) -> None:
        flat, start, row = self.memory
        array = flat[start:].reshape(-1, row)
        assert_close(array[: self.rows, : self.columns], expected, dtype, what)
        beside = array.copy()
        beside[: self.room[0], : self.room[1]] = fill
        np.testing.assert_array_equal(beside, np.full_like(beside, fill), what)
        np.testing.assert_array_equal(flat[:start], np.full(start, fill, dtype), what)


def test_a_block_fits_the_registers() -> None:
    assert BLOCK == (ROWS, VECTORS) and 1 <= FEW_ROWS <= ROWS
    assert ROWS * VECTORS + VECTORS + 1 <= 32


@by_dtype
def test_every_number_of_rows_and_columns(dtype: str) -> None:
    """C is unwritten memory, full of NaN, and what is beyond A's rows and B's columns is NaN as well."""
    depth = 7
    for rows, columns in itertools.product(row_counts(), column_counts(dtype)):
        a, b = matrix(rows, depth, dtype), matrix(depth, columns, dtype, seed=1)
        flat_a = np.concatenate([np.full(5, np.nan), a.ravel(), np.full(ROWS * depth, np.nan)]).astype(dtype)
        flat_b = np.concatenate([np.full(4, np.nan, dtype), in_panels(b, dtype)])
        c = Result(rows, columns, dtype, np.nan)
        left, right = Factor(flat_a, 5, depth, 1, 0, depth, 1), Panels(flat_b, 4, depth, 0, 0)
        product(left, rows, right, c.memory, columns, False)
        c.check(a.astype("float64") @ b, np.nan, dtype, f"{rows} rows, {columns} columns")


@by_dtype
def test_what_c_holds_is_added_to(dtype: str) -> None:
    depth = 5
    for rows, columns in itertools.product((1, ROWS + 1), column_counts(dtype)):
        a, b = matrix(rows, depth, dtype), matrix(depth, columns, dtype, seed=1)
        flat_a = np.concatenate([a.ravel(), np.zeros(ROWS * depth, dtype)])
        c = Result(rows, columns, dtype, 2)
        left, right = Factor(flat_a, 0, depth, 1, 0, depth, 1), Panels(in_panels(b, dtype), 0, depth, 0, 0)
        product(left, rows, right, c.memory, columns, True)
        c.check(2 + a.astype("float64") @ b, 2, dtype, f"{rows} rows, {columns} columns")


@by_dtype
@pytest.mark.parametrize(("run", "runs"), [(1, 1), (3, 1), (1, 4), (5, 3), (64, 2), (0, 3), (4, 0)])
def test_the_depth_is_runs_of_steps(run: int, runs: int, dtype: str) -> None:
    """A transposed, its runs apart; of B's rows the first two are another product's."""
    rows, columns, first, depth = ROWS + 2, vector(dtype) + 3, 2, run * runs
    room = rows + FEW_ROWS
    whole = matrix((run + 4) * max(runs, 1), room, dtype)  # a step of A lies `room` apart, a run `run + 4` steps
    a = np.concatenate([whole[i * (run + 4) : i * (run + 4) + run] for i in range(runs)] or [whole[:0]])[:, :rows].T
    b = matrix(first + depth + 1, columns, dtype, seed=1)
    c = Result(rows, columns, dtype, np.nan)
    left = Factor(whole.ravel(), 0, row=1, step=room, jump=(run + 4) * room, run=run, runs=runs)
    product(left, rows, Panels(in_panels(b, dtype), 0, len(b), 0, first), c.memory, columns, False)
    c.check(a.astype("float64") @ b[first : first + depth], np.nan, dtype, "product")


@by_dtype
def test_rows_of_b_may_lie_apart(dtype: str) -> None:
    rows, depth, first = ROWS + 1, 6, 1
    for columns in column_counts(dtype):
        a, b_row = matrix(rows, depth, dtype), up(columns, VECTORS * vector(dtype)) + 1
        b = np.full((first + depth, b_row), np.nan, dtype)
        b[:, :columns] = matrix(first + depth, columns, dtype, seed=1)
        flat_a = np.concatenate([a.ravel(), np.zeros(ROWS * depth, dtype)])
        c = Result(rows, columns, dtype, np.nan)
        left, right = Factor(flat_a, 0, depth, 1, 0, depth, 1), Panels(b.ravel(), 0, 1, b_row, first)
        product(left, rows, right, c.memory, columns, False)
        c.check(a.astype("float64") @ b[first:, :columns], np.nan, dtype, f"{columns} columns")


@by_dtype
def test_a_number_that_is_none_stays_in_its_row_or_column(dtype: str) -> None:
    rows, depth, columns = ROWS + 1, 3, VECTORS * vector(dtype) + 1
    a, b = np.ones((rows, depth), dtype), np.ones((depth, columns), dtype)
    a[ROWS, 1], b[2, 4] = np.nan, np.nan
    flat_a = np.concatenate([a.ravel(), np.zeros(ROWS * depth, dtype)])
    c = Result(rows, columns, dtype, np.nan)
    left, right = Factor(flat_a, 0, depth, 1, 0, depth, 1), Panels(in_panels(b, dtype), 0, depth, 0, 0)
    product(left, rows, right, c.memory, columns, False)
    expected = np.full((rows, columns), float(depth))
    expected[ROWS], expected[:, 4] = np.nan, np.nan
    c.check(expected, np.nan, dtype, "product")
