"""Sampling for the CPU: where a tap reads, reading it, and the ways back.

The rules are those of `sampling.rule`. Inside, channels come last, in blocks (`Layout`): a sample is 2^D rows of channels times
2^D weights, and the loop over channels fills whole vectors. Every image of a block ends with a row of zeros that stands for all
that is outside the map.

A tile is a run of output positions of one image, and a table holds the samples of one tap and offset group at its positions, in
two flat arrays of the thread's own: `rows` (int32) and `weights`, each a few runs of `size` numbers, one a position.

    rows      [0, 2^D)           the pixel of each corner within the image, that of the zeros if it is outside
              [2^D, 2^D + D)     position * stride - padding on each axis
    weights   [0, 2^D)           the product of the axes' weights, NaN where a coordinate is
              [2^D, 2^D + D)     fraction = offset - floor(offset) on each axis
              [2^D + D, ...)     2^D dot products of the backward pass

Corners count in binary: the first axis is the highest bit, and a set bit means the high corner of that axis. The tuple `size`
(the input's size, D numbers) carries the rank into every function by its type.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic

from deformconv.runtime.cache import device
from deformconv.runtime.vectors import (
    INT,
    Lanes,
    add_lanes,
    element,
    emit_with,
    for_channels,
    for_each,
    lanes_of,
)

# Positions are int32 here. An axis with its padding and window has less than 2**29 of them (`cpu.reasons_against`), so an
# offset of this size leads outside from everywhere, and no sum of an origin, a tap and a floor overflows.
REACH = 2.0**30

# The rows of `geometry`, an int64 array of D columns.
INPUT, KERNEL, STRIDE, BEFORE, DILATION, OUTPUT = range(6)


def table_sizes(axes: int, tile: int) -> tuple[int, int]:
    """How many int32 numbers and how many reals the table for a tile of `tile` positions takes."""
    corners = 1 << axes
    return (corners + axes) * tile, (2 * corners + axes) * tile


@device
def place_tile(size, geometry, first, count, rows, tile):
    """Note where each position of the tile has the origin of its window."""
    axes = len(size)
    origins = 1 << axes
    places, rest = size, first
    for axis in range(axes - 1, -1, -1):
        places = tuple_setitem(places, axis, rest % geometry[OUTPUT, axis])
        rest //= geometry[OUTPUT, axis]
    for t in range(count):
        carry = 1
        for axis in range(axes - 1, -1, -1):
            place = places[axis]
            rows[(origins + axis) * tile + t] = place * geometry[STRIDE, axis] - geometry[BEFORE, axis]
            place += carry
            carry = 1 if place == geometry[OUTPUT, axis] else 0
            places = tuple_setitem(places, axis, 0 if carry else place)


@device
def place_tap(size, geometry, inside, tap, count, offset, start, positions, rows, weights, tile):
    """Fill the table with one tap's samples; the offsets of its first axis begin at `start`, one a position."""
    shifts, rest = size, tap
    for axis in range(len(size) - 1, -1, -1):
        shifts = tuple_setitem(shifts, axis, rest % geometry[KERNEL, axis] * geometry[DILATION, axis])
        rest //= geometry[KERNEL, axis]
    _place_samples(offset, start, positions, size, shifts, inside, count, rows, weights, tile)


@intrinsic
def _place_samples(typing, offset, start, positions, size, shifts, inside, count, rows, weights, tile):
    """Split each coordinate into its two corners and the fraction between them, and fill the table."""
    names = "offset start positions size shifts inside count rows weights tile"

    def emit(builder, scalar, offset, start, positions, size, shifts, inside, count, rows, weights, tile):
        axes, add, times = len(size), builder.add, builder.mul
        corners = 1 << axes
        pixels = size[0]
        for length in size[1:]:
            pixels = times(pixels, length)

        def step(do, t, sums):
            whole = Lanes(builder, ir.IntType(32), do.width)

            def spread(number):
                return whole.spread(builder.trunc(number, ir.IntType(32)))

            one, zero = do.constant(1.0), do.zero
            rule = builder.icmp_signed("!=", spread(builder.zext(inside, INT)), whole.zero)
            found = [(whole.zero, None, None)]  # corners so far: row, whether it counts, weight
            for axis in range(axes):
                value = do.load(offset, add(add(start, times(INT(axis), positions)), t))
                near = builder.fcmp_ordered("<", _call(builder, "llvm.fabs", value), do.constant(REACH))  # no NaN is
                reached = builder.select(near, value, zero)
                floor = _call(builder, "llvm.floor", reached)
                origin = whole.load(rows, add(times(INT(corners + axis), tile), t))
                low = add(add(origin, spread(shifts[axis])), builder.fptosi(floor, whole.type))
                length = spread(size[axis])
                # As unsigned numbers, those below zero are beyond every size.
                low_counts = builder.and_(near, builder.icmp_unsigned("<", low, length))
                above = add(low, whole.constant(1))
                last = builder.and_(rule, builder.icmp_signed("==", above, length))
                high = builder.select(last, low, above)
                high_counts = builder.and_(near, builder.icmp_unsigned("<", high, length))
                high_counts = builder.and_(high_counts, builder.or_(low_counts, builder.not_(rule)))
                part = builder.select(last, zero, builder.fsub(reached, floor))
                part = builder.select(builder.fcmp_unordered("uno", value, value), value, part)
                do.store(part, weights, add(times(INT(corners + axis), tile), t))
                pair = ((low, low_counts, builder.fsub(one, part)), (high, high_counts, part))
                found = [
                    (
                        add(times(row, length), place),
                        counts if whether is None else builder.and_(whether, counts),
                        factor if weight is None else builder.fmul(weight, factor),
                    )
                    for row, whether, weight in found
                    for place, counts, factor in pair
                ]
            for corner, (row, counts, weight) in enumerate(found):
                place = add(times(INT(corner), tile), t)
                whole.store(builder.select(counts, row, spread(pixels)), rows, place)
                do.store(weight, weights, place)
            return sums

        _for_positions(builder, scalar, count, step)

    number = types.int64
    signature = types.void(
        offset, number, number, size, types.UniTuple(number, len(size)), types.boolean, number, rows, weights, number
    )
    return signature, emit_with(names, emit)


def _call(builder, name, value):
    """Call an LLVM intrinsic, "llvm.floor" say, on a vector."""
    bits = 32 if value.type.element == ir.FloatType() else 64
    function = ir.FunctionType(value.type, [value.type])
    full_name = f"{name}.v{value.type.count}f{bits}"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, full_name), [value])


def _for_positions(builder, scalar, count, step):
    """Emit `step(do, t, sums)` for t < count: whole vectors of positions, then one position at a time."""
    t = INT(0)
    for lanes in (lanes_of(scalar), 1):
        do = Lanes(builder, scalar, lanes)
        (t,) = for_each(builder, t, count, lanes, [], lambda t, sums, do=do: step(do, t, sums))


def _corners(builder, size, rows, weights, tile, t, x_start, row):
    """For one position, where each corner's row of channels begins, and its weight."""
    starts, factors = [], []
    for corner in range(1 << len(size)):
        place = builder.add(builder.mul(INT(corner), tile), t)
        pixel = builder.sext(builder.load(element(builder, rows, place)), INT)
        starts.append(builder.add(x_start, builder.mul(pixel, row)))
        factors.append(builder.load(element(builder, weights, place)))
    return starts, factors


@intrinsic
def _blend_position(typing, size, rows, weights, tile, t, x, x_start, row, scale, column, start, width):
    names = "size rows weights tile t x x_start row scale column start width"

    def emit(builder, scalar, size, rows, weights, tile, t, x, x_start, row, scale, column, start, width):
        starts, factors = _corners(builder, size, rows, weights, tile, t, x_start, row)

        def step(do, c, sums):
            values = [do.load(x, builder.add(corner, c)) for corner in starts]
            do.store(_blended(do, values, factors, scale), column, builder.add(start, c))
            return sums

        for_channels(builder, scalar, width, [], step)

    number = types.int64
    return types.void(
        size, rows, weights, number, number, x, number, number, x.dtype, column, number, number
    ), emit_with(names, emit)  # fmt: skip


def _blended(do, values, factors, scale):
    total = do.multiply(do.spread(factors[0]), values[0])
    for factor, value in zip(factors[1:], values[1:], strict=True):
        total = do.multiply_add(do.spread(factor), value, total)
    return do.multiply(do.spread(scale), total)


@device
def blend(size, rows, weights, tile, count, x, x_start, row, mask, mask_start, column, start, column_row, width):
    """column[t, c] = mask[t] * sum over corners of weight * x[corner, c] for c < width.

    All arrays are flat: pixel i of `x` begins at `x_start + i * row`, row t of `column` at `start + t * column_row`, and `mask`
    is empty for masks of 1. The mask multiplies the sum and not the weights: an infinite mask must not turn a weight of 0 into
    NaN.
    """
    for t in range(count):
        scale = mask[mask_start + t] if mask.size else x.dtype.type(1)
        _blend_position(size, rows, weights, tile, t, x, x_start, row, scale, column, start + t * column_row, width)


@intrinsic
def _pull_back_position(
    typing, size, rows, weights, tile, t, x, x_start, row, scale, column, d_column, start, d_x, d_x_start, scatter, width
):  # fmt: skip
    names = "size rows weights tile t x x_start row scale column d_column start d_x d_x_start scatter width"

    def emit(
        builder, scalar, size, rows, weights, tile, t, x, x_start, row, scale, column, d_column, start, d_x, d_x_start,
        scatter, width,
    ):  # fmt: skip
        add = builder.add
        starts, factors = _corners(builder, size, rows, weights, tile, t, x_start, row)
        shift = builder.sub(d_x_start, x_start)
        zero = ir.Constant(ir.VectorType(scalar, lanes_of(scalar)), None)

        def pass_over(scattering):
            def step(do, c, dots):
                values = [do.load(x, add(corner, c)) for corner in starts]
                d = do.load(d_column, add(start, c))
                do.store(_blended(do, values, factors, scale), column, add(start, c))
                if scattering:
                    scaled = do.multiply(do.spread(scale), d)
                    # One after the other: two corners may be the same row.
                    for corner, factor in zip(starts, factors, strict=True):
                        place = add(add(corner, shift), c)
                        do.store(do.multiply_add(do.spread(factor), scaled, do.load(d_x, place)), d_x, place)
                return [do.multiply_add(d, value, dot) for value, dot in zip(values, dots, strict=True)]

            dots = add_lanes(builder, for_channels(builder, scalar, width, [zero] * len(starts), step))
            for corner, dot in enumerate(dots):
                place = add(builder.mul(INT((1 << len(size)) + len(size) + corner), tile), t)
                builder.store(dot, element(builder, weights, place))

        with builder.if_else(scatter) as (scattering, reading):
            with scattering:
                pass_over(True)
            with reading:
                pass_over(False)

    number = types.int64
    signature = types.void(
        size, rows, weights, number, number, x, number, number, x.dtype, column, d_column, number, d_x, number,
        types.boolean, number,
    )  # fmt: skip
    return signature, emit_with(names, emit)


@device
def pull_back(
    size, rows, weights, tile, count, x, x_start, row, mask, mask_start, column, d_column, start, column_row,
    d_x, d_x_start, scatter, width,
):  # fmt: skip
    """One pass over the corners' rows, forwards and backwards.

    It blends as `blend` does, notes the dot products of d_column[t] with each corner's row in the table, which are all that
    the gradients of offset and mask need, and if `scatter` is set adds mask * weight * d_column[t] to the rows of `d_x`.
    """
    for t in range(count):
        scale = mask[mask_start + t] if mask.size else x.dtype.type(1)
        _pull_back_position(
            size, rows, weights, tile, t, x, x_start, row, scale, column, d_column, start + t * column_row,
            d_x, d_x_start, scatter, width,
        )  # fmt: skip


@intrinsic
def differentiate(
    typing, size, weights, tile, count, mask, mask_start, d_offset, d_offset_start, positions, d_mask, d_mask_start
):  # fmt: skip
    """d_offset[axis, t] and d_mask[t] of one tap from its dot products; a result of size 0 is not wanted.

    The interpolation is linear in each axis' fraction f: along the axis that is differentiated a pair of corners contributes
    high - low, along any other (1 - f) * low + f * high.
    """
    names = "size weights tile count mask mask_start d_offset d_offset_start positions d_mask d_mask_start"

    def generate(context, builder, signature, arguments):
        given = dict(zip(names.split(), zip(signature.args, arguments, strict=True), strict=True))

        def is_there(name):
            kind, array = given[name]
            return builder.icmp_signed(">", context.make_array(kind)(context, builder, array).nitems, INT(0))

        there = {name: is_there(name) for name in ("mask", "d_offset", "d_mask")}

        def emit(
            builder, scalar, size, weights, tile, count, mask, mask_start, d_offset, d_offset_start, positions,
            d_mask, d_mask_start,
        ):  # fmt: skip
            axes, add, times = len(size), builder.add, builder.mul
            corners = 1 << axes

            def step(do, t, sums):
                def run(number):
                    return do.load(weights, add(times(INT(number), tile), t))

                dots = [run(corners + axes + corner) for corner in range(corners)]
                with builder.if_then(there["d_mask"]):
                    total = do.multiply(run(0), dots[0])
                    for corner in range(1, corners):
                        total = do.multiply_add(run(corner), dots[corner], total)
                    do.store(total, d_mask, add(d_mask_start, t))
                with builder.if_then(there["d_offset"]):
                    fractions = [run(corners + axis) for axis in range(axes)]
                    before = builder.block
                    with builder.if_then(there["mask"]):
                        masks = do.load(mask, add(mask_start, t))
                        loading = builder.block
                    scale = builder.phi(do.type)
                    scale.add_incoming(do.constant(1.0), before)
                    scale.add_incoming(masks, loading)
                    for along in range(axes):
                        slope = _slope(do, dots, fractions, along)
                        place = add(add(d_offset_start, times(INT(along), positions)), t)
                        do.store(do.multiply(slope, scale), d_offset, place)
                return sums

            _for_positions(builder, scalar, count, step)

        return emit_with(names, emit)(context, builder, signature, arguments)

    number = types.int64
    signature = types.void(
        size, weights, number, number, mask, number, d_offset, number, number, d_mask, number
    )  # fmt: skip
    return signature, generate


def _slope(do, dots, fractions, along):
    """Merge the corners' dot products in pairs, axis by axis from the last one."""
    builder = do.builder
    for axis in range(len(fractions) - 1, -1, -1):
        part, merged = fractions[axis], []
        for low, high in zip(dots[::2], dots[1::2], strict=True):
            if axis == along:
                # With one axis nothing but this carries a coordinate's NaN on.
                slope = builder.fsub(high, low)
                merged.append(builder.select(builder.fcmp_unordered("uno", part, part), part, slope))
            else:
                rest = builder.fsub(do.constant(1.0), part)
                merged.append(do.multiply_add(part, high, do.multiply(rest, low)))
        dots = merged
    return dots[0]
