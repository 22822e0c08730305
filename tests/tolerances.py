"""How far two results may be apart: the one table, by dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

# The error of an array is max|actual - expected| / max|expected|. Half precision is computed in float32, so
# that its error is one rounding of the result.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


def error(actual: Any, expected: Any) -> float:
    """max|actual - expected| / max|expected|; where `expected` is 0 everywhere, max|actual|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))


def assert_close(actual: Any, expected: Any, dtype: str, what: str = "result") -> None:
    """The same shape, NaN and infinity at the same places, and the rest within the tolerance of `dtype`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    odd = actual[~finite], expected[~finite]
    assert np.isfinite(actual[finite]).all(), f"{what}: {np.sum(~np.isfinite(actual[finite]))} not finite"
    assert np.array_equal(*odd, equal_nan=True), f"{what}: {odd[0]} where {odd[1]} was expected"
    found = error(actual[finite], expected[finite])
    assert found <= TOLERANCE[dtype], f"{what}: error {found:.1e} over {TOLERANCE[dtype]:.0e} for {dtype}"
