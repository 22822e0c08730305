"""Sampling for the CPU: where a tap reads, reading it, and the ways back.

The rules are those of `sampling.rule`. Inside, channels come last: `x` is (rows, C), one row per pixel of every image, and a
last row of zeros that stands for every corner outside the map. So a sample is 2^D rows of C numbers times 2^D weights, and the
loop over channels fills whole vectors.

A tile is a run of up to T output positions of one image. A `Table` holds what is known of the samples at a tile's positions,
position last, so that the loops that fill it are vectors as well.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic

from deformconv.runtime.cache import device
from deformconv.runtime.vectors import blend_rows, dot_rows, scatter_rows

# Positions are int32 here. An axis with its padding and window has less than 2**29 of them (`cpu.reasons_against`), so an
# offset of this size leads outside from everywhere, and no sum of an origin, a tap and a floor overflows.
REACH = 2.0**30


class Window(NamedTuple):
    """The geometry of a call; every tuple has D numbers, so the rank is part of the type."""

    input_size: Any
    kernel_size: Any
    stride: Any
    before: Any  # padding before the first pixel
    dilation: Any
    output_size: Any
    inside: Any  # bool: the boundary rule "inside", else "zeros"


class Tile(NamedTuple):
    """`count` output positions of image `image` from `first` on."""

    image: Any
    first: Any
    count: Any


class Table(NamedTuple):
    """The samples of a tile, one entry per (tap, position).

    Corners count in binary: the first axis is the highest bit, and a set bit means the high corner of that axis.
    """

    corner_start: Any  # (2^D, entries) int64: where the corner's row begins in the flat `x`; that of the zeros if outside
    corner_weight: Any  # (2^D, entries): the product of the axes' weights, NaN where a coordinate is
    fraction: Any  # (D, entries): offset - floor(offset)
    origin: Any  # (D, T) int32: position * stride - padding
    corner_row: Any  # (2^D, T) int32, scratch of one tap: the corner's pixel within its image, -1 if outside
    low: Any  # (T,) int32, scratch of one axis: the two corners on it, -1 if outside
    high: Any


class TableSizes(NamedTuple):
    """How many numbers of each kind a table takes."""

    reals: int
    starts: int  # int64
    integers: int  # int32


def table_sizes(axes: int, entries: int, tile: int) -> TableSizes:
    """The scratch memory for a table of `entries` samples and tiles of `tile` positions."""
    corners = 1 << axes
    return TableSizes((corners + axes) * entries, corners * entries, (corners + axes + 2) * tile)


@device
def make_table(reals, starts, integers, axes, entries, tile):
    """Lay a table into scratch memory of `table_sizes`."""
    corners = 1 << axes
    weights, origins, rows = corners * entries, axes * tile, (axes + corners) * tile
    return Table(
        starts[:weights].reshape(corners, entries),
        reals[:weights].reshape(corners, entries),
        reals[weights : weights + axes * entries].reshape(axes, entries),
        integers[:origins].reshape(axes, tile),
        integers[origins:rows].reshape(corners, tile),
        integers[rows : rows + tile],
        integers[rows + tile : rows + 2 * tile],
    )


@device
def place_tile(table, window, tile):
    """Note where each position of the tile has the origin of its window."""
    origin, size = table.origin, window.output_size
    axes = len(size)
    rest = tile.first
    for axis in range(axes - 1, -1, -1):
        origin[axis, 0] = rest % size[axis]
        rest //= size[axis]
    for t in range(1, tile.count):
        carry = 1
        for axis in range(axes - 1, -1, -1):
            place = origin[axis, t - 1] + carry
            carry = 1 if place == size[axis] else 0
            origin[axis, t] = 0 if carry else place
    for axis in range(axes):
        for t in range(tile.count):
            origin[axis, t] = origin[axis, t] * window.stride[axis] - window.before[axis]


@device
def place_tap(table, entry, window, tile, tap, x, offset, start):
    """Fill the table from `entry` on with one tap's samples; `start` is where its first axis' offsets begin, one a position."""
    axes, count = len(window.input_size), tile.count
    end = entry + count
    for t in range(count):
        table.corner_row[0, t] = 0
        table.corner_weight[0, entry + t] = 1
    positions, taps = product(window.output_size), product(window.kernel_size)
    rest, place = tap, start + tile.first
    for axis in range(axes):
        taps //= window.kernel_size[axis]
        shift = np.int32(rest // taps * window.dilation[axis])
        rest %= taps
        size = np.int32(window.input_size[axis])
        low, high, fraction = table.low[:count], table.high[:count], table.fraction[axis, entry:end]
        _place_axis(offset[place : place + count], table.origin[axis, :count], shift, size, window.inside, low, high, fraction)
        place += positions
        # Every corner found so far becomes two. Going down keeps those that are still to be read.
        for corner in range((1 << axis) - 1, -1, -1):
            below, above = 2 * corner, 2 * corner + 1
            _split_row(
                table.corner_row[corner, :count],
                low,
                high,
                size,
                table.corner_row[below, :count],
                table.corner_row[above, :count],
            )
            weight = table.corner_weight
            _split_weight(weight[corner, entry:end], fraction, weight[below, entry:end], weight[above, entry:end])
    image_row = tile.image * product(window.input_size)
    for corner in range(1 << axes):
        _find_start(table.corner_row[corner, :count], image_row, x.shape, table.corner_start[corner, entry:end])


@device
def product(numbers):
    """The product of a tuple of integers."""
    result = 1
    for axis in range(len(numbers)):
        result *= numbers[axis]
    return result


@device
def _place_axis(offset, origin, shift, size, inside, low, high, fraction):
    """Split the coordinates on one axis into their two corners, -1 where outside, and the fraction between them."""
    zero, outside = offset.dtype.type(0), np.int32(-1)
    for t in range(offset.size):
        value = offset[t]
        near = abs(value) < REACH  # False for NaN
        reached = value if near else zero
        floor = math.floor(reached)
        corner = origin[t] + shift + np.int32(floor)
        last = inside & (corner == size - np.int32(1))
        low_counts = near & (corner >= 0) & (corner < size)
        above = corner if last else corner + np.int32(1)
        high_counts = near & (above >= 0) & (above < size) & (low_counts | (not inside))
        low[t] = corner if low_counts else outside
        high[t] = above if high_counts else outside
        part = zero if last else reached - floor
        fraction[t] = value if value != value else part


@device
def _split_row(row, low, high, size, low_row, high_row):
    """Extend a corner of the axes so far to its two on the next axis; `low_row` may be `row` itself."""
    outside = np.int32(-1)
    for t in range(row.size):
        found = row[t]
        # "|" is negative if either number is.
        high_row[t] = outside if (found | high[t]) < 0 else found * size + high[t]
        low_row[t] = outside if (found | low[t]) < 0 else found * size + low[t]


@device
def _split_weight(weight, fraction, low_weight, high_weight):
    """The same for its weight."""
    one = weight.dtype.type(1)
    for t in range(weight.size):
        whole, part = weight[t], fraction[t]
        high_weight[t] = whole * part
        low_weight[t] = whole * (one - part)


@device
def _find_start(row, image_row, x_shape, start):
    zeros, channels = x_shape[0] - 1, x_shape[1]
    for t in range(row.size):
        start[t] = (zeros if row[t] < 0 else image_row + row[t]) * channels


@intrinsic
def _corners(typing, array, entry, axes):
    """Column `entry` of a (2^D, entries) array as a tuple; `axes` is any tuple of D."""
    result = types.UniTuple(array.dtype, 1 << len(axes))

    def emit(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        row = cgutils.unpack_tuple(builder, array.shape)[1]
        values, index = [], arguments[1]
        for _ in range(result.count):
            values.append(builder.load(builder.gep(array.data, [index], inbounds=True)))
            index = builder.add(index, row)
        return context.make_tuple(builder, result, values)

    return result(array, entry, axes), emit


@device
def blend(table, entry, window, count, x, channel, width, mask, column, start, row):
    """column[t, c] = mask[t] * sum over corners of corner_weight * x[corner, channel + c] for c < width.

    `mask` is empty for a mask of ones. `x` and `column` are flat; row t of `column` begins at `start + t * row`. The mask
    multiplies the sum and not the weights: an infinite mask must not turn a weight of 0 into NaN.
    """
    scale = x.dtype.type(1)
    for t in range(count):
        if mask.size:
            scale = mask[t]
        starts = _corners(table.corner_start, entry + t, window.input_size)
        weights = _corners(table.corner_weight, entry + t, window.input_size)
        blend_rows(x, starts, channel, weights, scale, column, start + t * row, width)


@device
def scatter(table, window, count, d_column, start, row, mask, d_x, shift, outside, dump, channel, width):
    """The transpose of `blend`: add mask * corner_weight * d_column to the corners' rows of the flat `d_x`.

    They lie `shift` numbers after their places in `x`. A corner that begins at `outside` goes to `dump`, which nobody reads.
    """
    scale = d_column.dtype.type(1)
    for t in range(count):
        if mask.size:
            scale = mask[t]
        starts = _corners(table.corner_start, t, window.input_size)
        weights = _corners(table.corner_weight, t, window.input_size)
        into = starts
        for corner in range(len(starts)):
            place = dump if starts[corner] == outside else starts[corner] + shift
            into = tuple_setitem(into, corner, place)
        scatter_rows(d_column, start + t * row, weights, scale, d_x, into, channel, width)


@device
def project(table, window, count, d_column, start, row, x, channel, width, corner_dot):
    """corner_dot[corner, t] = d_column[t] . x[corner]: all that the gradients of offset and mask need."""
    for t in range(count):
        starts = _corners(table.corner_start, t, window.input_size)
        dots = dot_rows(d_column, start + t * row, x, starts, channel, width)
        for corner in range(len(dots)):
            corner_dot[corner, t] = dots[corner]


@device
def differentiate(table, count, corner_dot, mask, d_offset, d_mask, partial):
    """d_offset[axis, t] and d_mask[t] of one tap from `corner_dot`; `partial` is scratch of its shape.

    The interpolation is linear in each axis' fraction f: along the axis that is differentiated a pair of corners contributes
    high - low, along any other (1 - f) * low + f * high.
    """
    corners, axes = corner_dot.shape[0], table.fraction.shape[0]
    if d_mask.size:
        for t in range(count):
            d_mask[t] = 0
        for corner in range(corners):
            _add_product(table.corner_weight[corner, :count], corner_dot[corner, :count], d_mask)
    if d_offset.size == 0:
        return
    for along in range(axes):
        pairs, dots = corners >> 1, corner_dot
        for axis in range(axes - 1, -1, -1):
            fraction = table.fraction[axis, :count]
            for pair in range(pairs):
                low, high = dots[2 * pair, :count], dots[2 * pair + 1, :count]
                _merge_pair(low, high, fraction, axis == along, partial[pair, :count])
            pairs, dots = pairs >> 1, partial
        for t in range(count):
            d_offset[along, t] = partial[0, t] * mask[t] if mask.size else partial[0, t]


@device
def _add_product(a, b, total):
    for t in range(total.size):
        total[t] += a[t] * b[t]


@device
def _merge_pair(low, high, fraction, along, merged):
    one = low.dtype.type(1)
    for t in range(merged.size):
        part = fraction[t]
        between = (one - part) * low[t] + part * high[t]
        # With one axis nothing but this carries a coordinate's NaN on.
        slope = part if part != part else high[t] - low[t]
        merged[t] = slope if along else between
