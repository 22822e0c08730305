"""Sampling for the CPU: from positions to corners and weights, reading the corners, and the gradients of both.

`sampling.rule` says what is computed. Kernels keep channels last, in blocks (`runtime.blocks`): a sample is 2^D rows of
channels times 2^D weights, and the loop over channels fills whole vectors. Every image of a block ends with a row of zeros,
which corners outside the map read.

A tile is a run of positions of one image, and a `Table` holds one sample of each of them. Corners count in binary: the first
axis is the highest bit, and a set bit means the high corner of that axis. The tuple `size` (the input's size, D numbers)
carries the rank into every function by its type.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.tuple import tuple_setitem

from deformconv.runtime.cache import device
from deformconv.runtime.simd import (
    INT,
    Lanes,
    add_lanes,
    call_vector,
    element,
    emits,
    emits_result,
    for_channels,
    for_chunks,
    for_each,
    for_positions,
    for_usual_widths,
    lanes_of,
    row_writer,
)

__all__ = [
    "INT32_REACH", "Samples", "Table", "add_samples", "blend", "blend_samples", "differentiate", "place_at", "place_samples",
    "pull_back", "pull_back_samples", "rows_between", "slope", "table_in", "table_sizes",
]  # fmt: skip

# `sampling.rule.REACH` for positions that are int32. An axis with its padding and window has less than 2**29 pixels (the
# backend sees to that), so an offset of this size leads outside from everywhere, and no sum of an origin, a tap and a floor
# overflows.
INT32_REACH = 2.0**30
_ROW = ir.IntType(32)  # the number of a pixel in an image


class Table(NamedTuple):
    """The samples of one tap and offset group at a tile's positions, in flat arrays that no other thread uses.

    Each array is a few runs of `tile` numbers, one number for each position:

        rows      [0, 2^D)           each corner's pixel in the image, or the row of zeros if the corner is outside
                  [2^D, 2^D + D)     the position on each axis before offset and tap, an integer
        weights   [0, 2^D)           each corner's weight: the product over the axes, NaN where a coordinate is NaN
                  [2^D, 2^D + D)     fraction = offset - floor(offset) on each axis
                  [2^D + D, ...)     2^D dot products of the backward pass
    """

    rows: Any  # int32
    weights: Any
    tile: Any


def table_sizes(axes: int, tile: int) -> tuple[int, int]:
    """The number of int32 numbers and the number of reals in the table for a tile of `tile` positions."""
    corners = 1 << axes
    return (corners + axes) * tile, (2 * corners + axes) * tile


@device
def table_in(size, tile, integers, reals):
    """A table for a tile of `tile` positions, at the beginning of a thread's memory."""
    axes, corners = len(size), 1 << len(size)
    return Table(integers[: (corners + axes) * tile], reals[: (2 * corners + axes) * tile], tile)


@emits
def place_samples(builder, scalar, size, shifts, inside, count, offset, table):
    """Split each coordinate into its two corners and the fraction between them, and fill the table.

    A coordinate is the table's integer position, plus the integer `shifts[axis]`, plus `offset`'s number in row `axis`.
    """
    axes, add, times = len(size), builder.add, builder.mul
    runs = 1 << axes
    pixels = size[0]
    for length in size[1:]:
        pixels = times(pixels, length)

    def step(do, t):
        samples = Samples(do, inside, size)
        for axis in range(axes):
            value = do.load(offset.array, add(add(offset.start, times(INT(axis), offset.row)), t))
            origin = samples.whole.load(table.rows, add(times(INT(runs + axis), table.tile), t))
            fraction = samples.split(axis, origin, shifts[axis], value)
            do.store(fraction, table.weights, add(times(INT(runs + axis), table.tile), t))
        zeros = samples.whole.spread(builder.trunc(pixels, ir.IntType(32)))
        for corner, (row, lacks, weight) in enumerate(samples.corners):
            index = add(times(INT(corner), table.tile), t)
            counts = builder.icmp_signed("==", lacks, samples.whole.zero)
            samples.whole.store(builder.select(counts, row, zeros), table.rows, index)
            do.store(weight, table.weights, index)

    for_positions(builder, scalar, count, step)


@emits_result(types.int64)
def _rows_between(builder, scalar, size, table, count, pixels):
    """The first row that samples read times 2**32, plus the number of the row after the last one that is a pixel's."""
    pixels, low, high = builder.trunc(pixels, _ROW), builder.trunc(pixels, _ROW), _ROW(-1)

    def lesser(sign, a, b):
        return builder.select(builder.icmp_signed(sign, a, b), a, b)

    def step(do, t, bounds):
        low, high = bounds
        for corner in range(1 << len(size)):
            row = do.load(table.rows, builder.add(builder.mul(INT(corner), table.tile), t))
            inside = builder.icmp_signed("<", row, do.spread(pixels))
            low, high = lesser("<", row, low), lesser(">", builder.select(inside, row, do.constant(-1)), high)
        return [low, high]

    t = INT(0)
    for lanes in (lanes_of(scalar), 1):
        do = Lanes(builder, _ROW, lanes)
        t, lows, highs = for_each(builder, t, count, lanes, [do.spread(low), do.spread(high)], partial(step, do))
        for lane in range(lanes):
            low = lesser("<", builder.extract_element(lows, _ROW(lane)), low)
            high = lesser(">", builder.extract_element(highs, _ROW(lane)), high)
    after = builder.zext(builder.add(high, _ROW(1)), INT)
    return builder.or_(builder.shl(builder.zext(low, INT), INT(32)), after)


@device
def rows_between(size, table, count, pixels):
    """The first row of pixels that a table's samples read, and the one after the last; `pixels` and 0 if they read none."""
    found = _rows_between(size, table, count, pixels)
    return found >> 32, found & 0xFFFFFFFF


@device
def place_at(size, inside, count, position, table):
    """Fill the table with samples at absolute positions; row `axis` of `position` has the coordinates along that axis."""
    origins = (1 << len(size)) * table.tile
    shifts = size
    for axis in range(len(size)):
        shifts = tuple_setitem(shifts, axis, 0)
        for t in range(count):
            table.rows[origins + axis * table.tile + t] = 0
    place_samples(size, shifts, inside, count, position, table)


class Samples:
    """Emits the corners of a vector of positions, axis by axis.

    `corners` are those so far: each one's row, a number that is 0 if it counts (None: it does), and its weight (None: 1).
    """

    # Whether a corner counts is a number as wide as a pixel's, since vectors of single bits are put together slowly.

    def __init__(self, do, inside, size):
        self.do, self.size = do, size
        self.whole = Lanes(do.builder, ir.IntType(32), do.width)
        self.inside = self._spread(do.builder.sext(inside, INT))  # -1 or 0
        self.corners = [(self.whole.zero, None, None)]

    def _spread(self, number):
        return self.whole.spread(self.do.builder.trunc(number, ir.IntType(32)))

    def split(self, axis, origin, shift, offset):
        """Split the coordinates along one axis, and return their fractions."""
        do, whole, builder = self.do, self.whole, self.do.builder
        near = builder.fcmp_ordered("<", call_vector(builder, "llvm.fabs", offset), do.constant(INT32_REACH))  # no NaN is
        far = builder.sext(builder.not_(near), whole.type)
        reached = builder.select(near, offset, do.zero)
        floor = call_vector(builder, "llvm.floor", reached)
        low = builder.add(builder.add(origin, self._spread(shift)), builder.fptosi(floor, whole.type))
        length = self._spread(self.size[axis])
        above = builder.add(low, whole.constant(1))
        last = builder.and_(self.inside, builder.sext(builder.icmp_signed("==", above, length), whole.type))
        high = builder.add(above, last)
        low_lacks = builder.or_(far, self._beyond(low, length))
        high_lacks = builder.or_(builder.or_(far, self._beyond(high, length)), builder.and_(self.inside, low_lacks))
        fraction = builder.select(builder.icmp_signed("!=", last, whole.zero), do.zero, builder.fsub(reached, floor))
        fraction = builder.select(builder.fcmp_unordered("uno", offset, offset), offset, fraction)
        pair = ((low, low_lacks, builder.fsub(do.constant(1.0), fraction)), (high, high_lacks, fraction))
        self.corners = [
            (
                builder.add(builder.mul(row, length), pixel),
                lacks if other is None else builder.or_(other, lacks),
                factor if weight is None else builder.fmul(weight, factor),
            )
            for row, other, weight in self.corners
            for pixel, lacks, factor in pair
        ]
        return fraction

    def _beyond(self, pixel, length):
        """How far pixels are beyond an axis' last one; as an unsigned number, a negative one is beyond every size."""
        last = self.do.builder.sub(length, self.whole.constant(1))
        kind = self.whole.type
        function = cgutils.get_or_insert_function(
            self.do.builder.module, ir.FunctionType(kind, [kind, kind]), f"llvm.usub.sat.v{self.do.width}i32"
        )
        return self.do.builder.call(function, [pixel, last])


def _corners(builder, size, table, t, x):
    """For one position, where each corner's row of channels begins, and its weight."""
    starts, factors = [], []
    for corner in range(1 << len(size)):
        index = builder.add(builder.mul(INT(corner), table.tile), t)
        pixel = builder.sext(builder.load(element(builder, table.rows, index)), INT)
        starts.append(builder.add(x.start, builder.mul(pixel, x.row)))
        factors.append(builder.load(element(builder, table.weights, index)))
    return starts, factors


@emits
def _blend_position(builder, scalar, size, table, t, x, scale, column, width):
    starts, factors = _corners(builder, size, table, t, x)
    into = builder.add(column.start, builder.mul(t, column.row))

    def step(do, c, sums):
        values = [do.load(x.array, builder.add(corner, c)) for corner in starts]
        do.store(_blended(do, values, factors, scale), column.array, builder.add(into, c))
        return sums

    for_channels(builder, scalar, width, [], step)


def _blended(do, values, factors, scale):
    return do.multiply(do.spread(scale), _sum(do, values, factors))


def _sum(do, values, factors, total=None):
    """The values times their factors, added to `total`."""
    for factor, value in zip(factors, values, strict=True):
        factor = do.spread(factor)
        total = do.multiply(factor, value) if total is None else do.multiply_add(factor, value, total)
    return total


@emits
def _add_position(builder, scalar, size, table, t, x, column, width):
    starts, factors = _corners(builder, size, table, t, x)

    def step(do, c, sums):
        values = [do.load(x.array, builder.add(corner, c)) for corner in starts]
        into = builder.add(column.start, c)
        do.store(_sum(do, values, factors, do.load(column.array, into)), column.array, into)
        return sums

    for_channels(builder, scalar, width, [], step)


@device
def blend_samples(size, table, first, end, x, column, width):
    """As `add_samples`, for a row of `column` that holds nothing yet."""
    _blend_position(size, table, first, x, column.array.dtype.type(1), column, width)
    add_samples(size, table, first + 1, end, x, column, width)


@device
def add_samples(size, table, first, end, x, column, width):
    """column[c] += sum over the samples from `first` to `end` and their corners of weight * x[corner, c] for c < width."""
    for t in range(first, end):
        _add_position(size, table, t, x, column, width)


@emits
def _blend(builder, scalar, size, table, count, x, mask, mask_start, masked, column, width):
    def one_width(vectors):
        def position(t, _):
            starts, factors = _corners(builder, size, table, t, x)
            scale = _scale(builder, scalar, mask, builder.add(mask_start, t), masked)
            store = row_writer(builder, column, t)

            def step(do, c, sums):
                values = [do.load(x.array, builder.add(corner, c)) for corner in starts]
                store(do, _blended(do, values, factors, scale), c)
                return sums

            _over_channels(builder, scalar, width, vectors, [], step)
            return []

        for_each(builder, INT(0), count, 1, [], position)

    for_usual_widths(builder, lanes_of(scalar), width, one_width)


@emits
def _blend_products(builder, scalar, size, table, count, x, mask, mask_start, masked, weight, weight_start, sums, width):
    def chunk(do, vectors, channel):
        first = builder.add(weight_start, channel)
        weights = [do.load(weight, builder.add(first, INT(v * do.width))) for v in range(vectors)]

        def position(t, _):
            starts, factors = _corners(builder, size, table, t, x)
            scale = _scale(builder, scalar, mask, builder.add(mask_start, t), masked)
            into = builder.add(builder.add(sums.start, builder.mul(t, sums.row)), channel)
            for v, factor in enumerate(weights):
                c, place = builder.add(channel, INT(v * do.width)), builder.add(into, INT(v * do.width))
                values = [do.load(x.array, builder.add(corner, c)) for corner in starts]
                total = do.multiply_add(factor, _blended(do, values, factors, scale), do.load(sums.array, place))
                do.store(total, sums.array, place)
            return []

        for_each(builder, INT(0), count, 1, [], position)

    for_chunks(builder, scalar, width, chunk)


@device
def blend_products(size, table, count, x, mask, mask_start, weight, weight_start, sums, width):
    """sums[t, c] += weight[c] * what `blend` makes: a tap of a depthwise convolution."""
    _blend_products(size, table, count, x, mask, mask_start, mask.size > 0, weight, weight_start, sums, width)


def _over_channels(builder, scalar, width, vectors, sums, step):
    """`step` over the channels of some whole vectors, without a loop, or of any width for 0 vectors."""
    if not vectors:
        return for_channels(builder, scalar, width, sums, step)
    do = Lanes(builder, scalar, lanes_of(scalar))
    for vector in range(vectors):
        sums = step(do, INT(vector * do.width), sums)
    return sums


def _scale(builder, scalar, mask, index, masked):
    """A position's mask, or 1 where there are none."""
    return _loaded_or(ir.Constant(scalar, 1.0), builder, lambda: builder.load(element(builder, mask, index)), masked)


def _loaded_or(one, builder, load, masked):
    """What `load` gives where there are masks, and `one` elsewhere."""
    before = builder.block
    with builder.if_then(masked):
        loaded = load()
        loading = builder.block
    found = builder.phi(one.type)
    found.add_incoming(one, before)
    found.add_incoming(loaded, loading)
    return found


@device
def blend(size, table, count, x, mask, mask_start, column, width):
    """column[t, c] = mask[t] * sum over corners of weight * x[corner, c] for c < width.

    `x` and `column` are Rows, of pixels and of positions; `mask` is flat, and empty for masks of 1. The mask multiplies the sum
    and not the weights: an infinite mask must not turn a weight of 0 into NaN. What is blended is a factor of a product: the
    column may hold bfloat16, or pairs of it from two positions (`simd.row_writer`).
    """
    _blend(size, table, count, x, mask, mask_start, mask.size > 0, column, width)


def _pull_back_one(builder, scalar, size, table, t, x, scale, column, d_column, d_x, scattering, width, vectors):
    """Emit one position's pass over its corners' rows; `vectors` as in `_over_channels`."""
    add = builder.add
    starts, factors = _corners(builder, size, table, t, x)
    keep, source = row_writer(builder, column, t), add(d_column.start, builder.mul(t, d_column.row))
    shift = builder.sub(d_x.start, x.start)
    zero = ir.Constant(ir.VectorType(scalar, lanes_of(scalar)), None)

    def step(do, c, dots):
        values = [do.load(x.array, add(corner, c)) for corner in starts]
        d = do.load(d_column.array, add(source, c))
        keep(do, _blended(do, values, factors, scale), c)
        if scattering:
            scaled = do.multiply(do.spread(scale), d)
            # In turn, each read after the one before is written: two corners may be the same row.
            for corner, factor in zip(starts, factors, strict=True):
                index = add(add(corner, shift), c)
                do.store(do.multiply_add(do.spread(factor), scaled, do.load(d_x.array, index)), d_x.array, index)
        return [do.multiply_add(d, value, dot) for value, dot in zip(values, dots, strict=True)]

    dots = add_lanes(builder, _over_channels(builder, scalar, width, vectors, [zero] * len(starts), step))
    for corner, dot in enumerate(dots):
        index = add(builder.mul(INT((1 << len(size)) + len(size) + corner), table.tile), t)
        builder.store(dot, element(builder, table.weights, index))


@emits
def _pull_back_position(builder, scalar, size, table, t, x, scale, column, d_column, d_x, scatter, width):
    with builder.if_else(scatter) as (scattering, reading):
        with scattering:
            _pull_back_one(builder, scalar, size, table, t, x, scale, column, d_column, d_x, True, width, 0)
        with reading:
            _pull_back_one(builder, scalar, size, table, t, x, scale, column, d_column, d_x, False, width, 0)


@emits
def _pull_back(builder, scalar, size, table, count, x, mask, mask_start, masked, column, d_column, d_x, scatter, width):
    def pass_over(scattering):
        def one_width(vectors):
            def position(t, _):
                scale = _scale(builder, scalar, mask, builder.add(mask_start, t), masked)
                _pull_back_one(builder, scalar, size, table, t, x, scale, column, d_column, d_x, scattering, width, vectors)
                return []

            for_each(builder, INT(0), count, 1, [], position)

        for_usual_widths(builder, lanes_of(scalar), width, one_width)

    with builder.if_else(scatter) as (scattering, reading):
        with scattering:
            pass_over(True)
        with reading:
            pass_over(False)


@device
def pull_back(size, table, count, x, mask, mask_start, column, d_column, d_x, width):
    """The forward and the backward pass in one pass over the corners' rows.

    It blends as `blend` does. It writes the dot product of d_column[t] with each corner's row into the table: the gradients of
    offset and mask need nothing else. And it adds mask * weight * d_column[t] to the corners' rows of `d_x`, unless that is
    empty; its rows are as far apart as the rows of `x`.
    """
    _pull_back(size, table, count, x, mask, mask_start, mask.size > 0, column, d_column, d_x, d_x.array.size > 0, width)


@device
def pull_back_samples(size, table, first, end, x, scale, column, d_column, d_x, width):
    """`pull_back` for the samples from `first` to `end` of a table, which share a factor and the row of `d_column`.

    What it blends it leaves in the row of `column`, one sample after the other.
    """
    scatter = d_x.array.size > 0
    for t in range(first, end):
        _pull_back_position(size, table, t, x, scale, column, d_column, d_x, scatter, width)


@emits
def _differentiate(
    builder, scalar, size, table, count, mask, mask_start, masked, d_offset, offset_wanted, d_mask, d_mask_start, mask_wanted
):  # fmt: skip
    axes, add, times = len(size), builder.add, builder.mul
    corners = 1 << axes

    def step(do, t):
        def run(number):
            return do.load(table.weights, add(times(INT(number), table.tile), t))

        dots = [run(corners + axes + corner) for corner in range(corners)]
        with builder.if_then(mask_wanted):
            total = do.multiply(run(0), dots[0])
            for corner in range(1, corners):
                total = do.multiply_add(run(corner), dots[corner], total)
            do.store(total, d_mask, add(d_mask_start, t))
        with builder.if_then(offset_wanted):
            fractions = [run(corners + axis) for axis in range(axes)]
            scale = _mask_or_one(do, mask, add(mask_start, t), masked)
            for along in range(axes):
                index = add(add(d_offset.start, times(INT(along), d_offset.row)), t)
                do.store(do.multiply(slope(do, dots, fractions, along), scale), d_offset.array, index)

    for_positions(builder, scalar, count, step)


def _mask_or_one(do, mask, index, masked):
    """The masks from an index on, or ones where there is no mask."""
    return _loaded_or(do.constant(1.0), do.builder, lambda: do.load(mask, index), masked)


@device
def differentiate(size, table, count, mask, mask_start, d_offset, d_mask, d_mask_start):
    """d_offset[axis, t] and d_mask[t] of one tap from its dot products; results that are not wanted are empty.

    The interpolation is linear in each axis' fraction f: along the axis that is differentiated a pair of corners contributes
    high - low, along any other (1 - f) * low + f * high. `d_offset` are Rows, one of positions for each axis.
    """
    _differentiate(
        size, table, count, mask, mask_start, mask.size > 0,
        d_offset, d_offset.array.size > 0, d_mask, d_mask_start, d_mask.size > 0,
    )  # fmt: skip


def slope(do, dots, fractions, along):
    """Merge the corners' dot products in pairs, axis by axis from the last one."""
    builder = do.builder
    for axis in range(len(fractions) - 1, -1, -1):
        fraction, merged = fractions[axis], []
        for low, high in zip(dots[::2], dots[1::2], strict=True):
            if axis == along:
                # The slope is free of the fraction: with one axis, only this hands on the NaN of a coordinate.
                slope = builder.fsub(high, low)
                merged.append(builder.select(builder.fcmp_unordered("uno", fraction, fraction), fraction, slope))
            else:
                rest = builder.fsub(do.constant(1.0), fraction)
                merged.append(do.multiply_add(fraction, high, do.multiply(rest, low)))
        dots = merged
    return dots[0]
