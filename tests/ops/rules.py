"""What the suites of operators whose taps have offsets share: what a backend promises, what positions mean, odd numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.tolerances import assert_close

Array = np.ndarray[Any, Any]

by_boundary = pytest.mark.parametrize("boundary", ["zeros", "inside"])

SIZES = {1: (5,), 2: (4, 5), 3: (3, 4, 5)}

LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "axes in reverse order": lambda a: np.asfortranarray(a),
    "every other element": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "negative strides": lambda a: a[..., ::-1].copy()[..., ::-1],
    "channels last": lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) if a.ndim > 1 else a,
    "read-only": lambda a: _read_only(a.copy()),
    "expanded": lambda a: np.broadcast_to(a[:1], a.shape),
}


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


# What positions mean: the boundary, a position in a 1-D image with the values 1, 10, 100 at 0, 1, 2, its value and derivative.
POSITIONS = [
    ("zeros", -1.25, 0, 0),
    ("zeros", -1, 0, 1),  # at -1 and 3 and at every pixel: the piece on the right
    ("zeros", -0.25, 0.75, 1),
    ("zeros", 0, 1, 9),
    ("zeros", 0.5, 5.5, 9),
    ("zeros", 1, 10, 90),
    ("zeros", 1.75, 77.5, 90),
    ("zeros", 2, 100, -100),
    ("zeros", 2.75, 25, -100),
    ("zeros", 3, 0, 0),
    ("zeros", 100, 0, 0),
    ("zeros", -100, 0, 0),
    ("inside", -1, 0, 0),
    ("inside", -0.25, 0, 0),
    ("inside", 0, 1, 9),
    ("inside", 0.5, 5.5, 9),
    ("inside", 1, 10, 90),
    ("inside", 2, 100, 0),
    ("inside", 2.75, 100, 0),
    ("inside", 3, 0, 0),
    ("inside", 100, 0, 0),
]

# And with the values 1, inf, 3, since a pixel of weight 0 is read: the boundary, a position, its value.
INFINITE = [
    ("zeros", -1, 0),
    ("zeros", 0, np.nan),
    ("zeros", 0.5, np.inf),
    ("zeros", 1, np.inf),
    ("zeros", 1.5, np.inf),
    ("zeros", 2, 3),
    ("zeros", 3, 0),
    ("inside", -0.5, 0),
    ("inside", 0, np.nan),
    ("inside", 1.5, np.inf),
    ("inside", 2.5, 3),
]

FAR = [np.inf, -np.inf, 1e30, -1e30, 2.0**40, -(2.0**40), 2.0**63, 1e4, -1e4]
ODD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, 2.0**62]


class Rules:
    """What a backend can do, as its test file says, and how its results are compared."""

    backend: Any
    dtypes: ClassVar[tuple[str, ...]] = ("float64", "float32")  # from the finest, in which identities are tried
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)  # 2 is among them
    exact: ClassVar[bool] = True  # results that floating point can hold are right to the bit
    deterministic: ClassVar[bool] = True  # an image gives the same bits in every call, whatever its batch
    tables: ClassVar[dict[str, list[Any]]] = {}  # the cases that a test's argument of a name stands for

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try each test with all that the backend takes, as far as its arguments do not say otherwise."""
        values: dict[str, Any] = {"dtype": self.dtypes, "rank": self.ranks}
        for name, table in self.tables.items():
            values[name] = [case for case in table if len(case.size) in self.ranks]
        values["lower"] = [rank for rank in self.ranks if rank + 1 in self.ranks]
        said = [re.findall(r"\w+", str(mark.args[0])) for mark in metafunc.definition.iter_markers("parametrize")]
        for name in [name for name in values if name in metafunc.fixturenames and name not in chain(*said)]:
            metafunc.parametrize(name, values[name], ids=lambda value: getattr(value, "name", value))

    def array(self, array: Array) -> Any:
        """A NumPy array as the backend takes it."""
        return array

    def numpy(self, array: Any) -> Array:
        """A result of the backend as a NumPy array."""
        return array

    def assert_close(self, actual: Any, expected: Any, what: str = "result") -> None:
        assert_close(actual, expected, self.dtypes[0], what)

    def assert_exact(self, actual: Any, expected: Any, dtype: str) -> None:
        """Equal, where every number on the way is one that floating point holds."""
        if self.exact:
            np.testing.assert_array_equal(actual, expected)
        assert_close(actual, expected, dtype)

    def assert_repeats(self, actual: Any, expected: Any) -> None:
        """Equal, where the same numbers were computed with another time."""
        if self.deterministic:
            np.testing.assert_array_equal(actual, expected)
        self.assert_close(actual, expected)


def strewn(offset: Array) -> Array:
    """Offsets among which odd ones are strewn."""
    random = np.random.default_rng(7)
    offset = offset.copy()
    numbers = [np.nan, np.inf, -np.inf, 1e30, -1e30, -1, 0, 1, 2, 3, 4, 5, -0.0, 1e-30, -1e-30]
    chosen = random.random(offset.shape) < 0.1
    offset[chosen] = random.choice(numbers, size=int(chosen.sum()))
    return offset
