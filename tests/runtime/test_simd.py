"""What is emitted for the host's vectors, each piece against a few lines of NumPy, at sizes around a vector's."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from tests.tolerances import assert_close

from deformconv.runtime import cache
from deformconv.runtime.simd import (
    INT,
    VECTOR_BYTES,
    Lanes,
    add_lanes,
    element,
    emits,
    for_channels,
    for_each,
    host_features,
    lanes_of,
    named,
    prefetch,
    round_up,
    transpose_block,
)

compiled = numba.njit(**cache.OPTIONS)
by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def vector(dtype: str) -> int:
    """How many numbers a vector holds."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def around_a_vector(dtype: str) -> list[int]:
    lanes = vector(dtype)
    return sorted({0, 1, 2, 3, lanes - 1, lanes, lanes + 1, 2 * lanes, 3 * lanes - 1, 4 * lanes + lanes // 2 + 1})


def numbers(count: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(dtype)


def test_a_vector_has_the_hosts_width() -> None:
    features = host_features()
    expected = 64 if "avx512f" in features else 32 if features & {"avx", "avx2"} else 16
    assert expected == VECTOR_BYTES


# Loops over channels.


@emits
def _multiply_add(builder: Any, scalar: Any, x: Any, y: Any, start: Any, factor: Any, width: Any) -> None:
    def step(do: Lanes, c: Any, sums: list[Any]) -> list[Any]:
        place = builder.add(start, c)
        do.store(do.multiply_add(do.spread(factor), do.load(x, c), do.load(y, place)), y, place)
        return sums

    for_channels(builder, scalar, width, [], step)


@compiled
def multiply_add(x, y, start, factor, width):
    _multiply_add(x, y, start, factor, width)


@by_dtype
def test_a_loop_over_channels_reads_and_writes_each_once(dtype: str) -> None:
    factor = np.dtype(dtype).type(0.5)
    for width in around_a_vector(dtype):
        x, y = numbers(width, dtype), numbers(width + 5, dtype, seed=1)
        expected = y.copy()
        expected[3 : 3 + width] += factor * x
        multiply_add(x, y, 3, factor, width)
        assert_close(y, expected, dtype, f"width {width}")


@by_dtype
def test_a_number_that_is_none_stays_in_its_lane(dtype: str) -> None:
    width = vector(dtype) + 3
    for place in range(width):
        x = np.ones(width, dtype)
        x[place] = np.nan
        y = np.zeros(width, dtype)
        multiply_add(x, y, 0, np.dtype(dtype).type(2), width)
        np.testing.assert_array_equal(y, np.where(np.arange(width) == place, np.nan, 2))


@emits
def _dot_products(builder: Any, scalar: Any, x: Any, starts: list[Any], y: Any, results: Any, width: Any) -> None:
    def step(do: Lanes, c: Any, sums: list[Any]) -> list[Any]:
        d = do.load(y, c)
        return [do.multiply_add(d, do.load(x, builder.add(start, c)), total) for start, total in zip(starts, sums, strict=True)]

    zero = Lanes(builder, scalar, lanes_of(scalar)).zero
    totals = add_lanes(builder, for_channels(builder, scalar, width, [zero] * len(starts), step))
    for number, total in enumerate(totals):
        builder.store(total, element(builder, results, INT(number)))


@compiled
def dot_products(x, starts, y, results, width):
    _dot_products(x, starts, y, results, width)


@by_dtype
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_sums_of_lanes_are_dot_products(count: int, dtype: str) -> None:
    """For 2, 4 and 8 vectors, as many as there are corners, the lanes are folded into one another: each sum is its own."""
    for width in around_a_vector(dtype):
        x, y, results = numbers(count * width, dtype), numbers(width, dtype, seed=1), np.full(count, np.nan, dtype)
        dot_products(x, tuple(width * row for row in range(count)), y, results, width)
        expected = x.reshape(count, width).astype("float64") @ y
        assert_close(results, expected, dtype, f"width {width}")


@by_dtype
@pytest.mark.parametrize("count", [2, 8])
def test_a_sum_that_is_no_number_spoils_no_other(count: int, dtype: str) -> None:
    width = 2 * vector(dtype) - 1
    for row in range(count):
        for place in (0, width - 1):
            x, results = np.ones((count, width), dtype), np.empty(count, dtype)
            x[row, place] = np.nan
            dot_products(x.ravel(), tuple(width * row for row in range(count)), np.ones(width, dtype), results, width)
            np.testing.assert_array_equal(results, np.where(np.arange(count) == row, np.nan, width))


@emits
def _count_up(builder: Any, scalar: Any, results: Any, start: Any, stop: Any) -> None:
    steps = [INT(0), INT(0)]  # how many there were, and the sum of their indices
    found = for_each(builder, start, stop, 3, steps, lambda i, sums: [builder.add(sums[0], INT(1)), builder.add(sums[1], i)])
    for number, value in enumerate(found):
        builder.store(value, element(builder, results, INT(number)))


@compiled
def count_up(results, start, stop):
    _count_up(results, start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 2), (0, 3), (0, 7), (5, 14), (4, 4), (9, 2)])
def test_a_loop_takes_whole_steps_and_says_where_it_ended(start: int, stop: int) -> None:
    results = np.zeros(3, np.int64)
    count_up(results, start, stop)
    taken = list(range(start, stop - 2, 3))
    assert results.tolist() == [start + 3 * len(taken), len(taken), sum(taken)]


# Blocks.


@compiled
def transpose(source, start, row, into, into_start, into_row, bias, bias_start):
    transpose_block(source, start, row, into, into_start, into_row, bias, bias_start, bias.size > 0)


@by_dtype
@pytest.mark.parametrize("biased", [False, True])
def test_a_block_is_transposed_and_nothing_beside_it_written(biased: bool, dtype: str) -> None:
    lanes = vector(dtype)
    source, into = numbers(2 + lanes * (lanes + 3), dtype), np.full(5 + lanes * (lanes + 2), 7, dtype)
    source[2 + lanes + 4] = np.nan  # row 1, column 1
    bias = numbers(lanes + 1, dtype, seed=1) if biased else np.empty(0, dtype)
    transpose(source, 2, lanes + 3, into, 5, lanes + 2, bias, 1)
    block = source[2:].reshape(lanes, lanes + 3)[:, :lanes].T
    expected = np.full_like(into, 7)
    expected[5:].reshape(lanes, lanes + 2)[:, :lanes] = block + bias[1:, None] if biased else block
    np.testing.assert_array_equal(into, expected)


@compiled
def ask_for(array, index):
    prefetch(array, index)
    return array[0]


@by_dtype
def test_asking_for_a_cache_line_changes_nothing(dtype: str) -> None:
    array = numbers(100, dtype)
    before = array.copy()
    for index in (0, 99, 10**6):  # also beyond the array, as a kernel asks for what comes next
        assert ask_for(array, index) == before[0]
    np.testing.assert_array_equal(array, before)


@compiled
def rounded(number, multiple):
    return round_up(number, multiple)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_round_up(multiple: int) -> None:
    assert [rounded(number, multiple) for number in range(40)] == [-(-number // multiple) * multiple for number in range(40)]


class Span(NamedTuple):
    start: Any
    stop: Any


@compiled
def length(numbers):
    span = named(Span, numbers)
    return span.stop - span.start


def test_numbers_of_an_array_have_names() -> None:
    assert length(np.array([3, 10, 99])) == 7
