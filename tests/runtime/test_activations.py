"""Activations inside kernels, against NumPy in float64, over all numbers that there are."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from deformconv.runtime import cache
from deformconv.runtime.activations import scale_sigmoid
from deformconv.runtime.simd import VECTOR_BYTES

by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


@numba.njit(**cache.OPTIONS)
def squash(array, start, count, gain, slope, shift):
    scale_sigmoid(array, start, count, gain, slope, shift)


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x.astype("f8")))


@by_dtype
def test_a_sigmoid_is_right_to_the_last_bits(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=5000) * scale for scale in (1e-30, 1e-3, 1, 10, 60)]).astype(dtype)
    found = x.copy()
    squash(found, 0, x.size, 1, 1, 0)
    normal = sigmoid(x) > 2 * np.finfo(dtype).tiny  # what is smaller is 0
    relative = np.abs(found / sigmoid(x) - 1)[normal]
    assert relative.max() <= 8 * np.finfo(dtype).eps
    assert normal.mean() > 0.9


@by_dtype
def test_zero_gives_exactly_one_half_and_a_bounded_zero(dtype: str) -> None:
    x = np.zeros(5, dtype)
    squash(x, 0, 5, 2, 1, 0)
    assert (x == 1).all()
    x[:] = 0
    squash(x, 0, 5, 6, 2 / 3, -3)
    assert (x == 0).all()


@by_dtype
def test_a_scaled_sigmoid_is_a_tanh(dtype: str) -> None:
    x = np.linspace(-40, 40, 1001).astype(dtype)
    expected = 1.5 * np.tanh(x.astype("f8") / 1.5)
    squash(x, 0, x.size, 3, 2 / 1.5, -1.5)
    assert np.abs(x - expected).max() <= 10 * np.finfo(dtype).eps


@by_dtype
def test_what_is_not_finite_or_far_away(dtype: str) -> None:
    largest = np.finfo(dtype).max
    x = np.array([np.nan, np.inf, -np.inf, largest, -largest, 1e4, -1e4], dtype)
    with np.errstate(all="raise"):
        squash(x, 0, x.size, 2, 1, 0)
    np.testing.assert_array_equal(x, [np.nan, 2, 0, 2, 0, 2, 0])


@by_dtype
def test_a_run_of_numbers_and_nothing_beside_it(dtype: str) -> None:
    lanes = VECTOR_BYTES // np.dtype(dtype).itemsize
    for count in (0, 1, lanes - 1, lanes, lanes + 1, 3 * lanes + 2):
        given = np.random.default_rng(1).normal(size=count + 7).astype(dtype)
        found = given.copy()
        squash(found, 3, count, 1, 1, 0)
        np.testing.assert_array_equal(np.delete(found, range(3, 3 + count)), np.delete(given, range(3, 3 + count)))
        np.testing.assert_allclose(found[3 : 3 + count], sigmoid(given[3 : 3 + count]), rtol=1e-5)


@by_dtype
def test_a_number_s_result_does_not_depend_on_its_place(dtype: str) -> None:
    given = np.random.default_rng(2).normal(size=1000).astype(dtype)
    together, alone = given.copy(), given.copy()
    squash(together, 0, given.size, 2, 1, 0)
    for place in range(given.size):
        squash(alone, place, 1, 2, 1, 0)
    np.testing.assert_array_equal(together, alone)
