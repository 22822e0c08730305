"""What it means that two results agree: the package's table of tolerances, and where numbers must not be finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from deformconv.accuracy import TOLERANCE, error

__all__ = ["TOLERANCE", "assert_close", "error"]


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
