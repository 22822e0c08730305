"""The matrix product inside the kernels: one register block, written for the host's vector unit.

A block of C = A @ B is held in vector registers while the whole depth streams past it: for every step one row of B is loaded as
a few vectors, one number of A per block row is broadcast, and rows x vectors multiply-adds follow. It is emitted as LLVM IR
because no loop that Numba compiles is kept in registers reliably.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from deformconv.runtime.cache import device
from deformconv.runtime.vectors import INT, VECTOR_BYTES, Lanes, data_and_type, element, for_each, host_features, prefetch


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


def _register_block(rows: int, vectors: int) -> Any:
    """The intrinsic for a block of `rows` rows and `vectors` vectors."""

    @intrinsic
    def multiply_block(typing, a, a_start, a_row, a_step, a_jump, run, runs, b, b_start, b_step, c, c_start, c_row, accumulate):
        signature = types.void(
            a, *[types.int64] * 6, b, *[types.int64] * 2, c, *[types.int64] * 2, types.boolean
        )  # fmt: skip

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_start, a_row, a_step, a_jump, run, runs, b, b_start, b_step, c, c_start, c_row, accumulate = arguments
            a_data, scalar = data_and_type(context, builder, signature.args[0], a)
            b_data, _ = data_and_type(context, builder, signature.args[7], b)
            c_data, _ = data_and_type(context, builder, signature.args[10], c)
            lanes = VECTOR_BYTES * 8 // signature.args[0].dtype.bitwidth
            do = Lanes(builder, scalar, lanes)
            add, multiply = builder.add, builder.mul
            rows_of_a = [add(a_start, multiply(INT(r), a_row)) for r in range(rows)]
            sums = [do.zero] * (rows * vectors)

            def next_run(outer: Any, carried: list[Any]) -> list[Any]:
                b_index, *sums = carried
                shift = multiply(outer, a_jump)
                starts = [add(row, shift) for row in rows_of_a]

                def next_step(step: Any, carried: list[Any]) -> list[Any]:
                    a_offset, b_index, *sums = carried
                    row_of_b = [do.load(b_data, add(b_index, INT(v * lanes))) for v in range(vectors)]
                    results = []
                    for r, start in enumerate(starts):
                        number = do.spread(builder.load(element(builder, a_data, add(start, a_offset))))
                        for v in range(vectors):
                            results.append(do.multiply_add(number, row_of_b[v], sums[r * vectors + v]))
                    return [add(a_offset, a_step), add(b_index, b_step), *results]

                _, _, b_index, *sums = for_each(builder, INT(0), run, 1, [INT(0), b_index, *sums], next_step)
                return [b_index, *sums]

            _, _, *totals = for_each(builder, INT(0), runs, 1, [b_start, *sums], next_run)
            # What C held is added last: a sum over many calls then loses no more than a sum of their results. And where C is
            # overwritten it is never read: it may be fresh, unwritten memory.
            places = [add(add(c_start, multiply(INT(r), c_row)), INT(v * lanes)) for r in range(rows) for v in range(vectors)]
            with builder.if_else(accumulate) as (adding, overwriting):
                with adding:
                    for place, total in zip(places, totals, strict=True):
                        do.store(builder.fadd(do.load(c_data, place), total), c_data, place)
                with overwriting:
                    for place, total in zip(places, totals, strict=True):
                        do.store(total, c_data, place)
            return context.get_dummy_value()

        return signature, emit

    return multiply_block


_multiply_wide, _multiply_narrow = _register_block(ROWS, VECTORS), _register_block(ROWS, 1)
_multiply_few_wide, _multiply_few_narrow = _register_block(FEW_ROWS, VECTORS), _register_block(FEW_ROWS, 1)


@device
def multiply(
    a, a_start, a_row, a_step, a_jump, run, runs, rows, b, b_start, b_column, b_row, b_first,
    c, c_start, c_row, columns, accumulate,
):  # fmt: skip
    """C (+)= A @ B for flat arrays; `rows` is rounded up to FEW_ROWS and `columns` to a vector, for which there is room.

    The depth is `runs` runs of `run` steps: element (r, i, j) of A is `a[a_start + r * a_row + i * a_jump + j * a_step]`.
    B has its columns in panels of VECTORS vectors, the last one of a single vector if that is enough. The panel of column s
    begins at `b_start + s * b_column`, and its rows lie `b_row` apart, or side by side for a `b_row` of 0; the product takes
    those from `b_first` on.
    """
    lanes = VECTOR_BYTES // a.itemsize
    whole = rows // ROWS * ROWS
    for column in range(0, columns, VECTORS * lanes):
        narrow = columns - column <= lanes
        b_step = b_row if b_row else (lanes if narrow else VECTORS * lanes)
        b_panel = b_start + column * b_column + b_first * b_step
        # What the next panel has is on its way from memory while the blocks of this one are multiplied.
        following, share = b_start + (column + VECTORS * lanes) * b_column + b_first * b_step, 0
        if b_row == 0 and columns - column > VECTORS * lanes and whole:
            share = run * runs * min(VECTORS * lanes, columns - column - VECTORS * lanes) // (whole // ROWS)
        for row in range(0, whole, ROWS):
            a_block, into = a_start + row * a_row, c_start + column + row * c_row
            for place in range(following + row // ROWS * share, following + (row // ROWS + 1) * share, lanes):
                prefetch(b, place)
            if narrow:
                _multiply_narrow(a, a_block, a_row, a_step, a_jump, run, runs, b, b_panel, b_step, c, into, c_row, accumulate)
            else:
                _multiply_wide(a, a_block, a_row, a_step, a_jump, run, runs, b, b_panel, b_step, c, into, c_row, accumulate)
        for row in range(whole, rows, FEW_ROWS):
            a_block, into = a_start + row * a_row, c_start + column + row * c_row
            if narrow:
                _multiply_few_narrow(
                    a, a_block, a_row, a_step, a_jump, run, runs, b, b_panel, b_step, c, into, c_row, accumulate
                )
            else:
                _multiply_few_wide(a, a_block, a_row, a_step, a_jump, run, runs, b, b_panel, b_step, c, into, c_row, accumulate)
