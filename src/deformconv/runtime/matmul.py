"""The matrix product inside the kernels: one register block, written for the host's vector unit.

A block of C = A @ B is held in vector registers while the whole depth streams past it: for every step one row of B is loaded as
a few vectors, one number of A per block row is broadcast, and rows x vectors multiply-adds follow. It is emitted as LLVM IR
because no loop that Numba compiles is kept in registers reliably.

Where the panels of B are words, a step takes a pair of bfloat16 of each row of A, and a row of pairs of B (`runtime.pairs`), or
a register holds a tile of either (`runtime.amx`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from deformconv.runtime import pairs
from deformconv.runtime.amx import multiply_tiles
from deformconv.runtime.cache import device
from deformconv.runtime.simd import (
    INT,
    MULTIPLIES_PAIRS,
    VECTOR_BYTES,
    Lanes,
    are_for_tiles,
    bytes_of,
    element,
    emits,
    for_each,
    host_features,
    lanes_of,
    prefetch,
)

__all__ = ["BLOCK", "Block", "FEW_ROWS", "ROWS", "VECTORS", "BlockShape", "Factor", "Panels", "multiply"]


class BlockShape(NamedTuple):
    """Rows of the register block, and vectors in a row."""

    rows: int
    vectors: int


def _block_shape(features: frozenset[str]) -> BlockShape:
    # rows * vectors accumulators, the vectors of B and one broadcast must fit the registers: 32 of them, or 16.
    if "avx512f" in features:
        return BlockShape(12, 2)
    if {"avx", "avx2"} & features:
        return BlockShape(6, 2)
    return BlockShape(8, 2) if "neon" in features else BlockShape(4, 2)


BLOCK = _block_shape(host_features())
ROWS, VECTORS = BLOCK
# What is left of the rows goes through blocks of fewer, so that 196 positions do not cost what 204 do.
FEW_ROWS = max(1, ROWS // 3)


class Factor(NamedTuple):
    """The left factor A in flat memory: element (r, i, j) at `start + r * row + i * jump + j * step`.

    Its depth is `runs` runs i of `run` steps j. Beside panels of pairs an element is a pair: a word, or two numbers of an array
    of bfloat16.
    """

    array: Any
    start: Any
    row: Any
    step: Any
    jump: Any
    run: Any
    runs: Any


class Panels(NamedTuple):
    """The right factor B, its columns in panels of VECTORS vectors, the last one of a single vector if that is enough.

    The panel of column s begins at `start + s * column`. Its rows lie `row` apart, or side by side for a `row` of 0. A product
    takes those from `first` on. Rows of words hold pairs, each of a column and two neighbours along the depth.
    """

    array: Any
    start: Any
    column: Any
    row: Any
    first: Any


class Block:
    """Emits a register block: `shape` accumulators that stay in registers while the depth of A and B streams past."""

    def __init__(self, builder: Any, scalar: Any, shape: BlockShape, a: Any, b: Any, b_step: Any) -> None:
        self.builder, self.shape, self.a, self.b, self.b_step = builder, shape, a, b, b_step
        self.do = Lanes(builder, scalar, lanes_of(scalar))
        self.factors = Lanes(builder, pairs.WORD, self.do.width) if pairs.are_in(b.array) else self.do

    @property
    def zeros(self) -> list[Any]:
        """Sums of nothing, row by row."""
        return [self.do.zero] * (self.shape.rows * self.shape.vectors)

    def run(self, starts: list[Any], depth: Any, a_step: Any, b_index: Any, sums: list[Any]) -> list[Any]:
        """Add the products of `depth` numbers of each row of A, from `starts` on, and as many rows of B, from `b_index` on.

        Returns where B's next row begins, and the sums.
        """
        step = partial(self._step, starts, a_step)
        return for_each(self.builder, INT(0), depth, 1, [INT(0), b_index, *sums], step)[2:]

    def _step(self, starts: list[Any], a_step: Any, _: Any, carried: list[Any]) -> list[Any]:
        """One row of B, and one number of each row of A."""
        do, add, vectors = self.factors, self.builder.add, self.shape.vectors
        a_offset, b_index, *sums = carried
        row_of_b = [do.load(self.b.array, add(b_index, INT(v * do.width))) for v in range(vectors)]
        results = []
        for r, start in enumerate(starts):
            number = do.spread(self._element_of_a(add(start, a_offset)))
            results += [self._multiply_add(number, row_of_b[v], sums[r * vectors + v]) for v in range(vectors)]
        return [add(a_offset, a_step), add(b_index, self.b_step), *results]

    def _element_of_a(self, index: Any) -> Any:
        place = self.builder.bitcast(element(self.builder, self.a.array, index), self.factors.scalar.as_pointer())
        loaded = self.builder.load(place)
        loaded.align = bytes_of(self.a.array.type.pointee)
        return loaded

    def _multiply_add(self, a: Any, b: Any, total: Any) -> Any:
        if self.factors is self.do:
            return self.do.multiply_add(a, b, total)
        return pairs.add_products(self.builder, a, b, total, MULTIPLIES_PAIRS)

    def write(self, totals: list[Any], c: Any, start: Any, accumulate: Any) -> None:
        """Add the sums to those that C has from `start` on, or overwrite them.

        What C held is added last: a sum over many calls then loses no more than a sum of their results. And where C is
        overwritten it is never read: it may be fresh, unwritten memory.
        """
        do, add, times = self.do, self.builder.add, self.builder.mul
        rows, vectors = map(range, self.shape)
        places = [add(add(start, times(INT(r), c.row)), INT(v * do.width)) for r in rows for v in vectors]
        with self.builder.if_else(accumulate) as (adding, overwriting):
            with adding:
                for place, total in zip(places, totals, strict=True):
                    do.store(self.builder.fadd(do.load(c.array, place), total), c.array, place)
            with overwriting:
                for place, total in zip(places, totals, strict=True):
                    do.store(total, c.array, place)


def _register_block(rows: int, vectors: int) -> Any:
    """The intrinsic for a block of `rows` rows and `vectors` vectors."""

    @emits
    def multiply_block(builder, scalar, a, row, b, b_start, b_step, c, column, accumulate):
        """C[row:, column:] (+)= A[row:] @ B, whose rows lie `b_step` apart from `b_start` on."""
        add, times = builder.add, builder.mul
        block = Block(builder, scalar, BlockShape(rows, vectors), a, b, b_step)
        a_start, c_start = add(a.start, times(row, a.row)), add(add(c.start, column), times(row, c.row))
        rows_of_a = [add(a_start, times(INT(r), a.row)) for r in range(rows)]

        def next_run(run: Any, carried: list[Any]) -> list[Any]:
            b_index, *sums = carried
            shift = times(run, a.jump)
            return block.run([add(start, shift) for start in rows_of_a], a.run, a.step, b_index, sums)

        _, _, *totals = for_each(builder, INT(0), a.runs, 1, [b_start, *block.zeros], next_run)
        block.write(totals, c, c_start, accumulate)

    return multiply_block


_multiply_wide, _multiply_narrow = _register_block(ROWS, VECTORS), _register_block(ROWS, 1)
_multiply_few_wide, _multiply_few_narrow = _register_block(FEW_ROWS, VECTORS), _register_block(FEW_ROWS, 1)


@device
def multiply(a, rows, b, c, columns, accumulate):
    """C (+)= A @ B for a Factor, Panels and Rows.

    `rows` is rounded up to FEW_ROWS and `columns` to a vector, for which there is room.
    """
    panels = b.array
    if are_for_tiles(panels):
        multiply_tiles(a, rows, b, c, columns, accumulate)
        return
    lanes = VECTOR_BYTES // panels.itemsize
    whole = rows // ROWS * ROWS
    for column in range(0, columns, VECTORS * lanes):
        narrow = columns - column <= lanes
        b_step = b.row if b.row else (lanes if narrow else VECTORS * lanes)
        b_start = b.start + column * b.column + b.first * b_step
        # What the next panel has is on its way from memory while the blocks of this one are multiplied.
        following, share = b.start + (column + VECTORS * lanes) * b.column + b.first * b_step, 0
        if b.row == 0 and columns - column > VECTORS * lanes and whole:
            share = a.run * a.runs * min(VECTORS * lanes, columns - column - VECTORS * lanes) // (whole // ROWS)
        for row in range(0, whole, ROWS):
            for place in range(following + row // ROWS * share, following + (row // ROWS + 1) * share, lanes):
                prefetch(panels, place)
            if narrow:
                _multiply_narrow(a, row, b, b_start, b_step, c, column, accumulate)
            else:
                _multiply_wide(a, row, b, b_start, b_step, c, column, accumulate)
        for row in range(whole, rows, FEW_ROWS):
            if narrow:
                _multiply_few_narrow(a, row, b, b_start, b_step, c, column, accumulate)
            else:
                _multiply_few_wide(a, row, b, b_start, b_step, c, column, accumulate)
