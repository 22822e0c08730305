"""The matrix product of a convolution whose taps have not moved, without a copy of what lies under them.

As `runtime.matmul`, but the left factor's rows are pixels: for every tap each row of a register block begins at a pixel of its
own, and the whole depth streams past sums that stay in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from deformconv.runtime.cache import device
from deformconv.runtime.matmul import FEW_ROWS, ROWS, VECTORS, Block, BlockShape
from deformconv.runtime.simd import INT, VECTOR_BYTES, Rows, element, emits, for_each, for_positions, lanes_of

__all__ = ["multiply_pixels", "place_pixels"]

_SMALL = ir.IntType(32)


@emits
def place_pixels(builder, scalar, size, shifts, count, origins, tile, places, start):
    """places[start + t] = the pixel under a tap that has not moved, the one after the last if that is outside.

    `origins[axis * tile + t]` is where the window at position t begins along an axis, `shifts[axis]` the tap's place within it.
    """
    add, times = builder.add, builder.mul
    pixels = size[0]
    for length in size[1:]:
        pixels = times(pixels, length)

    def step(do, t):
        def spread(number):
            return do.spread(builder.trunc(number, _SMALL))

        pixel, inside = do.zero, None
        for axis, (length, shift) in enumerate(zip(size, shifts, strict=True)):
            place = add(do.load(origins, add(times(INT(axis), tile), t)), spread(shift))
            counts = builder.icmp_unsigned("<", place, spread(length))  # what is below zero is beyond every size
            inside = counts if inside is None else builder.and_(inside, counts)
            pixel = add(times(pixel, spread(length)), place)
        do.store(builder.select(inside, pixel, spread(pixels)), places, add(start, t))

    for_positions(builder, _SMALL, count, step)


def _register_block(rows: int, vectors: int) -> Any:
    @emits
    def multiply_block(builder, scalar, x, width, places, taps, row, b, b_tap, c, column, accumulate):
        """C[row:, column:] (+)= A @ B; A's row r is, tap by tap, `width` numbers of `x` from the pixel `places[tap, r]` on.

        B's rows lie side by side, those of the next tap `b_tap` numbers further.
        """
        add, times = builder.add, builder.mul
        block = Block(builder, scalar, BlockShape(rows, vectors), x, b, INT(vectors * lanes_of(scalar)))

        def next_tap(tap: Any, sums: list[Any]) -> list[Any]:
            first = add(add(places.start, times(tap, places.row)), row)
            pixels = [builder.load(element(builder, places.array, add(first, INT(r)))) for r in range(rows)]
            starts = [add(x.start, times(builder.sext(pixel, INT), x.row)) for pixel in pixels]
            return block.run(starts, width, INT(1), add(b.start, times(tap, b_tap)), sums)[1:]

        _, *totals = for_each(builder, INT(0), taps, 1, block.zeros, next_tap)
        block.write(totals, c, add(add(c.start, column), times(row, c.row)), accumulate)

    return multiply_block


_multiply_wide, _multiply_narrow = _register_block(ROWS, VECTORS), _register_block(ROWS, 1)
_multiply_few_wide, _multiply_few_narrow = _register_block(FEW_ROWS, VECTORS), _register_block(FEW_ROWS, 1)


@device
def multiply_pixels(x, width, places, taps, rows, b, depth, c, columns, accumulate):
    """C (+)= A @ B: A's row t is, tap by tap, `width` channels of the pixel `places[tap, t]` of `x`.

    `b` are panels, as `runtime.matmul.Panels` of a whole weight with `depth` rows to a tap has them, from the first of these
    taps and channels on; `rows` is rounded up to FEW_ROWS.
    """
    lanes = VECTOR_BYTES // b.array.itemsize
    whole = rows // ROWS * ROWS
    for column in range(0, columns, VECTORS * lanes):
        narrow = columns - column <= lanes
        step = lanes if narrow else VECTORS * lanes
        panel = Rows(b.array, b.start + column * b.column + b.first * step, step)
        for row in range(0, whole, ROWS):
            if narrow:
                _multiply_narrow(x, width, places, taps, row, panel, depth * step, c, column, accumulate)
            else:
                _multiply_wide(x, width, places, taps, row, panel, depth * step, c, column, accumulate)
        for row in range(whole, rows, FEW_ROWS):
            if narrow:
                _multiply_few_narrow(x, width, places, taps, row, panel, depth * step, c, column, accumulate)
            else:
                _multiply_few_wide(x, width, places, taps, row, panel, depth * step, c, column, accumulate)
