"""How far two results may be apart: the one formula and the one table, by dtype, of tests and of the checks that users run."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["TOLERANCE", "error"]

# Half precision is computed in float32, so that its error is one rounding of the result, and of each sample at the most.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


def error(actual: Any, expected: Any) -> float:
    """max|actual - expected| / max|expected|; where `expected` is 0 everywhere, max|actual|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))
