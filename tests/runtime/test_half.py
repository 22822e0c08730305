"""Half precision in memory: every number of it read, and numbers of all kinds written, against NumPy and exact arithmetic."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from deformconv.runtime import arrays, cache, half
from deformconv.runtime.blocks import copy_rows, transpose
from deformconv.runtime.simd import INT, VECTOR_BYTES, Rows, element, emits, for_each, read, write

compiled = numba.njit(**cache.OPTIONS)
LANES = VECTOR_BYTES // 4
BITS = {"float16": np.int16, "bfloat16": np.uint16}
by_kind = pytest.mark.parametrize("kind", BITS)
by_way = pytest.mark.parametrize(
    ("kind", "native"), [("float16", True), ("float16", False), ("bfloat16", True)], ids=["float16", "by integers", "bfloat16"]
)

ALL = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


def exactly_widened(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "float16":
        return bits.view(np.float16).astype(np.float32)
    sign, exponent, rest = bits >> 15, (bits >> 7 & 0xFF).astype(np.int64), (bits & 0x7F).astype(np.float64)
    with np.errstate(over="ignore"):
        size = np.where(exponent == 0, np.ldexp(rest, -133), np.ldexp(rest + 128, exponent - 134))
    size = np.where(exponent == 255, np.where(rest == 0, np.inf, np.nan), size)
    return (np.where(sign == 1, -1.0, 1.0) * size).astype(np.float32)


def exactly_narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest number of the two around each, in float64; a tie goes to the one whose last bit is 0. As float32."""
    if kind == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    size = np.abs(values)
    low = (size.view(np.uint32) >> 16).astype(np.uint16)
    # Beyond the largest number the next step counts as one of the same size, as IEEE 754 has it.
    around = [exactly_widened(bits, kind).astype(np.float64) for bits in (low, low + np.uint16(1))]
    around[1] = np.where(np.isinf(around[1]), 2.0**128, around[1])
    with np.errstate(invalid="ignore"):  # of infinities
        below, above = (np.abs(size - number) for number in around)
    up = (above < below) | ((above == below) & (low % 2 == 1))
    found = np.copysign(exactly_widened(np.where(up & np.isfinite(size), low + np.uint16(1), low), kind), values)
    return np.where(np.isnan(values), values, found)


def some_numbers() -> np.ndarray:
    """Numbers of all sizes, every tie of both kinds beside its neighbours, infinities, NaN, zeros of both signs."""
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    ties = np.concatenate([(np.arange(2**16, dtype=np.uint32) << 16) + 0x8000, np.arange(0, 2**32, 0x1000, np.uint32)])
    odd = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 65504, 65519.996, 65520, 3.4e38, 1e-45, 6e-8, 2.98e-8], np.float32)
    payloads = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7FBFFFFF], np.uint32)
    return np.concatenate([random, ties - 1, ties, ties + 1, odd.view(np.uint32), payloads]).view(np.float32)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """The same numbers, zeros of the same sign, and NaN at the same places, whatever its bits are."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def _copy(native: bool) -> tuple[Any, Any]:
    """Kernels that read and write whole vectors, by the processor's instructions or by integers."""

    @emits
    def widen(builder: Any, scalar: Any, source: Any, into: Any, count: Any) -> None:
        def step(index: Any, _: Any) -> list[Any]:
            value = builder.load(element(builder, source, index))
            builder.store(half.widened(builder, value, native), element(builder, into, index))
            return []

        for_each(builder, INT(0), count, 1, [], step)

    @emits
    def narrow(builder: Any, scalar: Any, source: Any, into: Any, count: Any) -> None:
        def step(index: Any, _: Any) -> list[Any]:
            value = builder.load(element(builder, source, index))
            builder.store(half.narrowed(builder, value, into.type.pointee, native), element(builder, into, index))
            return []

        for_each(builder, INT(0), count, 1, [], step)

    @compiled
    def widen_all(source, into):
        widen(source, into, source.size)

    @compiled
    def narrow_all(source, into):
        narrow(source, into, source.size)

    return widen_all, narrow_all


@by_way
def test_every_number_is_read_as_it_is(kind: str, native: bool) -> None:
    if native and kind == "float16" and not _converts():
        pytest.skip("this processor does not convert float16")
    found = np.zeros(ALL.size, np.float32)
    _copy(native)[0](ALL.view(BITS[kind]), found)
    assert_same(found, exactly_widened(ALL, kind))
    _rows(ALL.view(BITS[kind]), vectors := np.zeros_like(found), 1, ALL.size)
    assert_same(vectors, found)


@by_way
def test_numbers_are_rounded_to_the_nearest(kind: str, native: bool) -> None:
    if native and kind == "float16" and not _converts():
        pytest.skip("this processor does not convert float16")
    values = some_numbers()
    found = np.zeros(values.size, BITS[kind])
    _copy(native)[1](values, found)
    assert_same(exactly_widened(found.view(np.uint16), kind), exactly_narrowed(values, kind))
    _rows(values, vectors := np.zeros_like(found), 1, values.size)
    assert_same(exactly_widened(vectors.view(np.uint16), kind), exactly_narrowed(values, kind))


def _converts() -> bool:
    from deformconv.runtime import simd

    return simd.CONVERTS


@by_kind
def test_numpy_s_way_there_and_back(kind: str) -> None:
    """What offsets and masks in half precision, of which there are few, are brought to float32 by."""
    dtype = np.dtype(np.float16 if kind == "float16" else np.uint16)
    assert_same(arrays.widened(ALL.view(dtype)), exactly_widened(ALL, kind))
    values = some_numbers()
    with np.errstate(over="ignore"):
        found = arrays.narrowed(values, dtype)
    assert found.dtype == dtype
    assert_same(exactly_widened(found.view(np.uint16), kind), exactly_narrowed(values, kind))
    assert arrays.widened(values) is values
    assert arrays.narrowed(values, values.dtype) is values


@compiled
def _rows(source, into, count, width):
    copy_rows(Rows(source, 0, width), Rows(into, 0, width), count, width)


@compiled
def _turned(source, into, rows, columns, bias):
    transpose(rows, columns, source, 0, columns, into, 0, rows, bias, 0)


@compiled
def _one_by_one(source, into):
    for index in range(source.size):
        write(into, index, read(source, index))


@by_kind
@pytest.mark.parametrize("width", [1, 3, LANES - 1, LANES, LANES + 1, 3 * LANES + LANES // 2 + 1])
def test_copies_of_rows_and_of_single_numbers(kind: str, width: int) -> None:
    values = np.random.default_rng(0).normal(size=3 * width).astype(np.float32)
    expected = exactly_narrowed(values, kind)
    short, long = np.zeros(3 * width, BITS[kind]), np.zeros(3 * width, np.float32)
    _rows(values, short, 3, width)
    assert_same(exactly_widened(short.view(np.uint16), kind), expected)
    _rows(short, long, 3, width)
    assert_same(long, expected)
    again = np.zeros_like(short)
    _one_by_one(long, again)
    np.testing.assert_array_equal(again, short)


@by_kind
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, LANES, 2 * LANES + 3])
@pytest.mark.parametrize("columns", [2, LANES, LANES + 1])
def test_transposition_in_both_directions(kind: str, rows: int, columns: int, biased: bool) -> None:
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    short = np.zeros(rows * columns, BITS[kind])
    bias = np.zeros(columns if biased else 0, BITS[kind])
    if biased:
        _one_by_one(np.random.default_rng(1).normal(size=columns).astype(np.float32), bias)
    _turned(values.ravel(), short, rows, columns, bias)
    added = exactly_widened(bias.view(np.uint16), kind) if biased else np.float32(0)
    expected = exactly_narrowed(np.ascontiguousarray((values + added).T), kind)
    assert_same(exactly_widened(short.view(np.uint16), kind).reshape(columns, rows), expected)
    back = np.zeros(rows * columns, np.float32)
    _turned(short, back, columns, rows, np.zeros(0, np.float32))
    assert_same(back.reshape(rows, columns), np.ascontiguousarray(expected.T))
