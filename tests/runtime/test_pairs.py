"""Products of pairs of bfloat16: as plain operations against float64, and as the instructions of a processor that has them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from tests.runtime.test_matmul import Result, column_counts, matrix, product, row_counts

import deformconv
from deformconv.runtime import arrays, cache
from deformconv.runtime.matmul import FEW_ROWS, ROWS, VECTORS, Factor, Panels
from deformconv.runtime.simd import VECTOR_BYTES, Rows, write_row

BITS = np.dtype(np.uint16)
LANES = VECTOR_BYTES // 4


@numba.njit(**cache.OPTIONS)
def write_rows(source, into, count, width):
    for row in range(count):
        write_row(source, into.start + row * width, into, row, width)


def rounded(array: np.ndarray) -> np.ndarray:
    """The numbers in bfloat16, as float32."""
    return arrays.widened(arrays.narrowed(array, BITS))


def in_panels_of_pairs(b: np.ndarray) -> np.ndarray:
    """B as words, with NaN in the columns that fill the last panel up."""
    depth, columns = b.shape
    panels = []
    for column in range(0, columns, VECTORS * LANES):
        part = b[:, column : column + VECTORS * LANES]
        panel = np.full((depth, LANES if part.shape[1] <= LANES else VECTORS * LANES), np.nan, np.float32)
        panel[:, : part.shape[1]] = part
        bits = arrays.narrowed(panel, BITS).astype(np.uint32)
        panels.append((bits[::2] | bits[1::2] << 16).ravel())
    return np.concatenate(panels)


def check(c: Result, a: np.ndarray, b: np.ndarray, before: float, fill: float, what: str) -> None:
    """The processor's instruction rounds each of its sums in its own way: a sum may lose a unit in the last place at each."""
    found = c.memory.array[c.memory.start :].reshape(-1, c.memory.row)[: c.rows, : c.columns]
    exact = before + a.astype("float64") @ b.astype("float64")
    bound = len(b) * 2.0**-23 * (abs(before) + np.abs(a).astype("float64") @ np.abs(b).astype("float64"))
    assert (np.abs(found - exact) <= bound).all(), what
    found[...] = exact
    c.check(exact, fill, "float32", what)


@pytest.mark.parametrize("before", [np.nan, 2.0], ids=["into nothing", "added"])
def test_every_number_of_rows_and_columns(before: float) -> None:
    depth = 14
    for rows, columns in itertools.product(row_counts(), column_counts("float32")):
        a, b = rounded(matrix(rows, depth, "float32")), rounded(matrix(depth, columns, "float32", seed=1))
        flat = np.concatenate([np.full(5, np.nan, np.float32), a.ravel(), np.full(ROWS * depth, np.nan, np.float32)])
        flat_b = np.concatenate([np.zeros(4, np.uint32), in_panels_of_pairs(b)])
        c = Result(rows, columns, "float32", before)
        left = Factor(arrays.narrowed(flat, BITS), 5, depth, 2, 0, depth // 2, 1)
        product(left, rows, Panels(flat_b, 4, depth // 2, 0, 0), c.memory, columns, before == 2.0)
        check(c, a, b, 2.0 if before == 2.0 else 0.0, before, f"{rows} rows, {columns} columns")


@pytest.mark.parametrize(("run", "runs"), [(2, 1), (6, 3), (2, 9), (64, 2), (0, 3), (4, 0), (288, 1)])
def test_the_depth_is_runs_of_pairs(run: int, runs: int) -> None:
    rows, columns, first, depth = ROWS + 2, LANES + 3, 4, run * runs
    whole = rounded(matrix(rows + ROWS, (run + 6) * max(runs, 1), "float32"))
    a = whole.reshape(len(whole), max(runs, 1), run + 6)[:rows, :runs, :run].reshape(rows, depth)
    b = rounded(matrix(first + depth + 2, columns, "float32", seed=1))
    c = Result(rows, columns, "float32", np.nan)
    left = Factor(arrays.narrowed(whole, BITS).ravel(), 0, row=whole.shape[1], step=2, jump=run + 6, run=run // 2, runs=runs)
    product(left, rows, Panels(in_panels_of_pairs(b), 0, len(b) // 2, 0, first // 2), c.memory, columns, False)
    check(c, a, b[first : first + depth], 0.0, np.nan, "product")


@pytest.mark.parametrize("depth", [2, 7, 14, 33])
def test_pairs_of_rows_as_they_are_written(depth: int) -> None:
    """Both factors as the backward pass has them: words of two positions, of which a last one may be alone."""
    rows, pairs_ = ROWS + 1, -(-depth // 2)
    for columns in column_counts("float32"):
        a, b = rounded(matrix(depth, rows, "float32")), rounded(matrix(depth, columns, "float32", seed=1))
        row = columns + VECTORS * LANES
        left, right = np.full(pairs_ * rows + ROWS, 7, np.uint32), np.full(pairs_ * row, 7, np.uint32)
        write_rows(arrays.narrowed(a, BITS).ravel(), Rows(left, 0, rows), depth, rows)
        spaced = np.zeros((depth, row), np.float32)
        spaced[:, :columns] = b
        write_rows(spaced.ravel(), Rows(right, 0, row), depth, row)
        c = Result(rows, columns, "float32", np.nan)
        product(Factor(left, 0, 1, rows, 0, pairs_, 1), rows, Panels(right, 0, 1, row, 0), c.memory, columns, False)
        check(c, a.T, b, 0.0, np.nan, f"{columns} columns")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_stays_in_its_row_or_column(number: float) -> None:
    rows, depth, columns = ROWS + 1, 4, VECTORS * LANES + 1
    for place in (1, 2):  # of both halves of a pair
        a, b = np.ones((rows, depth), np.float32), np.ones((depth, columns), np.float32)
        a[ROWS, place], b[place, 4] = number, number
        flat = np.concatenate([a.ravel(), np.zeros(FEW_ROWS * depth, np.float32)])
        c = Result(rows, columns, "float32", np.nan)
        left = Factor(arrays.narrowed(flat, BITS), 0, depth, 2, 0, depth // 2, 1)
        product(left, rows, Panels(in_panels_of_pairs(b), 0, depth // 2, 0, 0), c.memory, columns, False)
        found = c.memory.array[c.memory.start :].reshape(-1, c.memory.row)[:rows, :columns]
        np.testing.assert_array_equal(found, a @ b)


def test_samples_are_rounded_to_the_nearest_and_ties_to_the_even_one() -> None:
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, np.nan, np.inf, -np.inf, -0.0, 3.4e38], np.float32)
    values = np.resize(values, 5 * LANES + 3)
    single, paired = np.zeros(values.size, np.uint16), np.full(values.size, 7, np.uint32)
    write_rows(values, Rows(single, 0, values.size), 1, values.size)
    write_rows(values, Rows(paired, 0, values.size), 1, values.size)
    np.testing.assert_array_equal(arrays.widened(single), rounded(values))
    np.testing.assert_array_equal(paired >> 16, 0)
    np.testing.assert_array_equal(arrays.widened(paired.astype(np.uint16)), rounded(values))


ASSEMBLY = """
import re
import numpy as np
from numba import types
from deformconv.runtime.matmul import Factor, Panels
from deformconv.runtime.simd import MULTIPLIES_PAIRS, Rows
from tests.runtime.test_matmul import product
from tests.runtime.test_pairs import write_rows
assert MULTIPLIES_PAIRS
numbers = types.int64
array = {dtype: types.Array(getattr(types, dtype), 1, "C") for dtype in ("float32", "uint16", "uint32")}
rows = {dtype: types.NamedTuple([kind, numbers, numbers], Rows) for dtype, kind in array.items()}
factor = types.NamedTuple([array["uint16"], *[numbers] * 6], Factor)
panels = types.NamedTuple([array["uint32"], *[numbers] * 4], Panels)
product.compile((factor, numbers, panels, rows["float32"], numbers, types.boolean))
for into in ("uint16", "uint32"):
    write_rows.compile((array["float32"], rows[into], numbers, numbers))
for function in (product, write_rows):
    for text in function.inspect_asm().values():
        print(*(len(re.findall(name, text)) for name in ("vdpbf16ps", "vcvtneps2bf16")))
"""


def on_sapphire_rapids(program: str, folder: Path, *features: str) -> str:
    """What a program prints whose kernels are compiled for such a processor, with some features, and kept in a folder."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("these are x86-64 processors")
    vectors = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx512bf16,+avx2,+fma,+f16c"
    environment = os.environ | {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join([vectors, *features]),
        "DEFORMCONV_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(deformconv.__file__).parents[1])]),
    }
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_processors_that_have_them_use_their_instructions(tmp_path: Path) -> None:
    """Compiled for one of these here, and not run."""
    printed = on_sapphire_rapids(ASSEMBLY, tmp_path)
    products, *writes = ([int(number) for number in line.split()] for line in printed.splitlines())
    # Blocks of 12 and of 4 rows, of two vectors and of one: each sum of each block once, at least.
    assert products[0] >= (12 + 4) * (2 + 1)
    assert len(writes) == 2 and all(count >= 1 for _, count in writes)
