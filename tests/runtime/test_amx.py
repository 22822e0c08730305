"""Products of pairs of bfloat16 by tiles: emulated against float64, and as the instructions of a processor that has them."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.runtime.test_matmul import Result, column_counts, matrix, product
from tests.runtime.test_pairs import BITS, LANES, check, in_panels_of_pairs, on_sapphire_rapids, rounded

from deformconv.runtime import amx, arrays
from deformconv.runtime.matmul import VECTORS, Factor, Panels

ROWS = amx.ROWS


def for_tiles(b: np.ndarray) -> np.ndarray:
    """B in panels of pairs that are multiplied by tiles."""
    return in_panels_of_pairs(b).view(np.int32)


def check_all(c: Result, a: np.ndarray, b: np.ndarray, before: float, fill: float, what: str) -> None:
    """Also that no row beyond the last was written."""
    whole = c.memory.array[c.memory.start :].reshape(-1, c.memory.row)
    np.testing.assert_array_equal(whole[c.rows :], fill)
    check(c, a, b, before, fill, what)


@pytest.mark.parametrize("before", [np.nan, 2.0], ids=["into nothing", "added"])
@pytest.mark.parametrize("depth", [2, 32, 70])
def test_every_number_of_rows_and_columns(depth: int, before: float) -> None:
    for rows, columns in itertools.product((0, 1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3), column_counts("float32")):
        a, b = rounded(matrix(rows, depth, "float32")), rounded(matrix(depth, columns, "float32", seed=1))
        flat = np.concatenate([np.full(5, np.nan, np.float32), a.ravel()])
        c = Result(rows, columns, "float32", before)
        left, right = (
            Factor(arrays.narrowed(flat, BITS), 5, depth, 2, 0, depth // 2, 1),
            Panels(for_tiles(b), 0, depth // 2, 0, 0),
        )
        product(left, rows, right, c.memory, columns, before == 2.0)
        check_all(c, a, b, 2.0 if before == 2.0 else 0.0, before, f"{rows} rows, {columns} columns")


@pytest.mark.parametrize(("run", "runs"), [(2, 1), (6, 3), (32, 9), (64, 2), (0, 3), (4, 0), (288, 1)])
def test_the_depth_is_runs_of_pairs(run: int, runs: int) -> None:
    rows, columns, first, depth = ROWS + 2, LANES + 3, 4, run * runs
    whole = rounded(matrix(rows, (run + 6) * max(runs, 1), "float32"))
    a = whole.reshape(len(whole), max(runs, 1), run + 6)[:rows, :runs, :run].reshape(rows, depth)
    b = rounded(matrix(first + depth + 2, columns, "float32", seed=1))
    c = Result(rows, columns, "float32", np.nan)
    left = Factor(arrays.narrowed(whole, BITS).ravel(), 0, row=whole.shape[1], step=2, jump=run + 6, run=run // 2, runs=runs)
    product(left, rows, Panels(for_tiles(b), 0, len(b) // 2, 0, first // 2), c.memory, columns, False)
    check_all(c, a, b[first : first + depth], 0.0, np.nan, "product")


@pytest.mark.parametrize("pairs", [1, 16, 33])
def test_words_of_a_and_rows_of_b_that_lie_apart(pairs: int) -> None:
    """Both factors as the backward pass has them, for the weight's gradient."""
    rows = ROWS + 1
    for columns in column_counts("float32"):
        a, b = rounded(matrix(rows, 2 * pairs, "float32")), rounded(matrix(2 * pairs, columns, "float32", seed=1))
        row = columns + VECTORS * LANES
        bits = np.zeros((2 * pairs, row), np.uint32)
        bits[:, :columns] = arrays.narrowed(b, BITS)
        left, right = arrays.narrowed(a, BITS).view(np.int32).ravel(), (bits[::2] | bits[1::2] << 16).view(np.int32).ravel()
        c = Result(rows, columns, "float32", np.nan)
        product(Factor(left, 0, pairs, 1, 0, pairs, 1), rows, Panels(right, 0, 1, row, 0), c.memory, columns, False)
        check_all(c, a, b, 0.0, np.nan, f"{columns} columns")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_stays_in_its_row_or_column(number: float) -> None:
    rows, depth, columns = ROWS + 1, 36, VECTORS * LANES + 1
    for place in (1, 2, 35):  # of both halves of a pair, and in the last ones
        a, b = np.ones((rows, depth), np.float32), np.ones((depth, columns), np.float32)
        a[ROWS, place], b[place, 4] = number, number
        c = Result(rows, columns, "float32", np.nan)
        left = Factor(arrays.narrowed(a, BITS).ravel(), 0, depth, 2, 0, depth // 2, 1)
        product(left, rows, Panels(for_tiles(b), 0, depth // 2, 0, 0), c.memory, columns, False)
        found = c.memory.array[c.memory.start :].reshape(-1, c.memory.row)[:rows, :columns]
        np.testing.assert_array_equal(found, a @ b)


@pytest.mark.parametrize(
    ("has", "platform", "answer"), [(True, "linux", 0), (True, "linux", -1), (True, "darwin", 0), (False, "linux", 0)]
)
def test_the_system_is_asked_where_there_are_tiles(
    has: bool, platform: str, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def syscall(*numbers: int) -> int:
        asked.append(numbers)
        return answer

    monkeypatch.setattr(amx, "HAS_TILES", has)
    monkeypatch.setattr(amx.sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(syscall=syscall))
    assert amx.are_permitted() == (has and platform == "linux" and answer == 0)
    assert asked == ([(158, 0x1023, 18)] if has and platform == "linux" else [])


ASSEMBLY = """
import re
from numba import types
from deformconv.runtime.matmul import Factor, Panels
from deformconv.runtime.simd import Rows
from deformconv.runtime.amx import HAS_TILES
from tests.runtime.test_matmul import product
assert HAS_TILES
numbers = types.int64
array = {dtype: types.Array(getattr(types, dtype), 1, "C") for dtype in ("float32", "uint16", "int32")}
factor = types.NamedTuple([array["uint16"], *[numbers] * 6], Factor)
panels = types.NamedTuple([array["int32"], *[numbers] * 4], Panels)
into = types.NamedTuple([array["float32"], numbers, numbers], Rows)
product.compile((factor, numbers, panels, into, numbers, types.boolean))
(text,) = product.inspect_asm().values()
for name in ("ldtilecfg", "tdpbf16ps", "tileloadd", "tilestored", "tilezero", "tilerelease"):
    print(len(re.findall(rf"{name}\\b", text)))
"""


@pytest.mark.slow
def test_processors_that_have_them_use_their_instructions(tmp_path: Path) -> None:
    """Compiled for one of these here, and not run."""
    printed = on_sapphire_rapids(ASSEMBLY, tmp_path, "+amx-tile", "+amx-bf16")
    configured, products, *others = map(int, printed.split())
    # For panels of two tiles and of one, each for 16 rows and for fewer: products of whole depths and of what is left.
    assert configured == 4 and products >= 2 * 2 * (2 + 1)
    assert all(count >= 1 for count in others)
