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

from deformconv.runtime.cache import device

# An offset as large as this leads outside from every position: no axis has as many pixels. Its floor fits int32.
REACH = 2.0**30


class Table(NamedTuple):
    """The samples of a tile, one entry per (tap, position).

    Corners count in binary: the first axis is the highest bit, and a set bit means the high corner of that axis.
    """

    corner_row: Any  # (2^D, entries) int32: the corner's pixel within its image, -1 outside the map
    corner_weight: Any  # (2^D, entries): the product of the axes' weights, NaN where a coordinate is
    fraction: Any  # (D, entries): offset - floor(offset)
    origin: Any  # (D, T) int32: position * stride - padding
    low: Any  # (T,) int32: scratch, the two corners on one axis
    high: Any


def table_sizes(axes: int, entries: int, tile: int) -> tuple[int, int]:
    """How many reals and how many int32 a table takes."""
    return ((1 << axes) + axes) * entries, (1 << axes) * entries + (axes + 2) * tile


@device
def make_table(reals, integers, axes, entries, tile):  # type: ignore[no-untyped-def]
    """Lay a table into scratch memory of `table_sizes`."""
    corners = 1 << axes
    at, to = corners * entries, (corners + axes) * entries
    by = at + axes * tile
    return Table(
        integers[:at].reshape(corners, entries),
        reals[:at].reshape(corners, entries),
        reals[at:to].reshape(axes, entries),
        integers[at:by].reshape(axes, tile),
        integers[by : by + tile],
        integers[by + tile : by + 2 * tile],
    )


@device
def place_tile(table, first, count, output_size, stride, before):  # type: ignore[no-untyped-def]
    """Note the origin of the `count` output positions from `first` on."""
    origin, axes = table.origin, len(output_size)
    rest = first
    for axis in range(axes - 1, -1, -1):
        origin[axis, 0] = rest % output_size[axis]
        rest //= output_size[axis]
    for t in range(1, count):
        carry = 1
        for axis in range(axes - 1, -1, -1):
            place = origin[axis, t - 1] + carry
            carry = 1 if place == output_size[axis] else 0
            origin[axis, t] = 0 if carry else place
    for axis in range(axes):
        for t in range(count):
            origin[axis, t] = origin[axis, t] * stride[axis] - before[axis]


@device
def place_tap(table, entry, offset, tap, first, count, kernel_size, dilation, input_size, inside):  # type: ignore[no-untyped-def]
    """Fill the table from `entry` on with one tap's samples; `offset` is (K, D, positions) of one image and offset group."""
    axes = len(input_size)
    zero, one = offset.dtype.type(0), offset.dtype.type(1)
    for t in range(entry, entry + count):
        table.corner_row[0, t] = 0
        table.corner_weight[0, t] = one
    window, rest = offset.shape[0], tap
    for axis in range(axes):
        window //= kernel_size[axis]
        shift = np.int32(rest // window * dilation[axis])
        rest %= window
        size = np.int32(input_size[axis])
        _place_axis(table, entry, offset[tap, axis, first : first + count], axis, shift, size, inside, zero)
        # Every corner found so far becomes two. Going down keeps those that are still to be read.
        for corner in range((1 << axis) - 1, -1, -1):
            for t in range(count):
                row = table.corner_row[corner, entry + t]
                weight = table.corner_weight[corner, entry + t]
                fraction = table.fraction[axis, entry + t]
                low, high = table.low[t], table.high[t]
                # Only a negative number's highest bit is set, so "|" is negative if either is.
                table.corner_row[2 * corner, entry + t] = np.int32(-1) if (row | low) < 0 else row * size + low
                table.corner_row[2 * corner + 1, entry + t] = np.int32(-1) if (row | high) < 0 else row * size + high
                table.corner_weight[2 * corner, entry + t] = weight * (one - fraction)
                table.corner_weight[2 * corner + 1, entry + t] = weight * fraction


@device
def _place_axis(table, entry, offset, axis, shift, size, inside, zero):  # type: ignore[no-untyped-def]
    """Split the coordinate on one axis into its two corners, -1 where outside, and the fraction between them."""
    outside = np.int32(-1)
    for t in range(offset.size):
        value = offset[t]
        near = abs(value) < REACH  # False for NaN
        reached = value if near else zero
        floor = math.floor(reached)
        corner = table.origin[axis, t] + shift + np.int32(floor)
        last = inside & (corner == size - 1)
        low_counts = near & (corner >= 0) & (corner < size)
        high = corner if last else corner + np.int32(1)
        high_counts = near & (high >= 0) & (high < size) & (low_counts | (not inside))
        table.low[t] = corner if low_counts else outside
        table.high[t] = high if high_counts else outside
        fraction = zero if last else reached - floor
        table.fraction[axis, entry + t] = value if value != value else fraction


@device
def blend(table, entry, count, x, image_row, channel, width, mask, column, column_start, column_row):  # type: ignore[no-untyped-def]
    """column[t, :width] = mask[t] * sum over corners of corner_weight * x[corner_row, channel:channel + width].

    `mask` is empty for a mask of ones. `column` is flat: row t starts at `column_start + t * column_row`.
    """
    corners, zeros = table.corner_row.shape[0], x.shape[0] - 1
    for t in range(count):
        e, start = entry + t, column_start + t * column_row
        scale = mask[t] if mask.size else x.dtype.type(1)
        if corners == 2:
            row_0, row_1 = table.corner_row[0, e], table.corner_row[1, e]
            row_0 = image_row + row_0 if row_0 >= 0 else zeros
            row_1 = image_row + row_1 if row_1 >= 0 else zeros
            weight_0, weight_1 = table.corner_weight[0, e], table.corner_weight[1, e]
            for c in range(width):
                column[start + c] = scale * (weight_0 * x[row_0, channel + c] + weight_1 * x[row_1, channel + c])
        for four in range(0, corners - 3, 4):
            row_0, row_1 = table.corner_row[four, e], table.corner_row[four + 1, e]
            row_2, row_3 = table.corner_row[four + 2, e], table.corner_row[four + 3, e]
            row_0 = image_row + row_0 if row_0 >= 0 else zeros
            row_1 = image_row + row_1 if row_1 >= 0 else zeros
            row_2 = image_row + row_2 if row_2 >= 0 else zeros
            row_3 = image_row + row_3 if row_3 >= 0 else zeros
            weight_0, weight_1 = table.corner_weight[four, e], table.corner_weight[four + 1, e]
            weight_2, weight_3 = table.corner_weight[four + 2, e], table.corner_weight[four + 3, e]
            if four == 0:
                for c in range(width):
                    column[start + c] = scale * (
                        weight_0 * x[row_0, channel + c]
                        + weight_1 * x[row_1, channel + c]
                        + weight_2 * x[row_2, channel + c]
                        + weight_3 * x[row_3, channel + c]
                    )
            else:
                for c in range(width):
                    column[start + c] += scale * (
                        weight_0 * x[row_0, channel + c]
                        + weight_1 * x[row_1, channel + c]
                        + weight_2 * x[row_2, channel + c]
                        + weight_3 * x[row_3, channel + c]
                    )


@device
def scatter(table, entry, count, d_column, column_start, column_row, mask, d_x, image_row, channel, width):  # type: ignore[no-untyped-def]
    """The transpose of `blend`: add mask * corner_weight * d_column to the corner rows of d_x."""
    for t in range(count):
        e, start = entry + t, column_start + t * column_row
        for corner in range(table.corner_row.shape[0]):
            row = table.corner_row[corner, e]
            if row >= 0:
                weight = table.corner_weight[corner, e]
                if mask.size:
                    weight *= mask[t]
                for c in range(width):
                    d_x[image_row + row, channel + c] += weight * d_column[start + c]


@device
def project(table, entry, count, d_column, column_start, column_row, x, image_row, channel, width, corner_dot):  # type: ignore[no-untyped-def]
    """corner_dot[corner, t] = d_column[t] . x[corner_row]: all that the gradients of offset and mask need."""
    zeros = x.shape[0] - 1
    for t in range(count):
        start = column_start + t * column_row
        for corner in range(0, table.corner_row.shape[0], 2):
            row_0, row_1 = table.corner_row[corner, entry + t], table.corner_row[corner + 1, entry + t]
            row_0 = image_row + row_0 if row_0 >= 0 else zeros
            row_1 = image_row + row_1 if row_1 >= 0 else zeros
            dot_0 = dot_1 = x.dtype.type(0)
            for c in range(width):
                dot_0 += d_column[start + c] * x[row_0, channel + c]
                dot_1 += d_column[start + c] * x[row_1, channel + c]
            corner_dot[corner, t] = dot_0
            corner_dot[corner + 1, t] = dot_1


@device
def differentiate(table, entry, count, corner_dot, mask, d_offset, d_mask, partial):  # type: ignore[no-untyped-def]
    """d_offset[axis, t] and d_mask[t] of one tap from `corner_dot`; `partial` is scratch of its shape.

    The interpolation is linear in each axis' fraction f: along the axis that is differentiated a pair of corners contributes
    high - low, along any other (1 - f) * low + f * high.
    """
    corners, axes = corner_dot.shape[0], table.fraction.shape[0]
    if d_mask.size:
        for t in range(count):
            total = table.corner_weight[0, entry + t] * corner_dot[0, t]
            for corner in range(1, corners):
                total += table.corner_weight[corner, entry + t] * corner_dot[corner, t]
            d_mask[t] = total
    if d_offset.size == 0:
        return
    one = corner_dot.dtype.type(1)
    for along in range(axes):
        for corner in range(corners):
            for t in range(count):
                partial[corner, t] = corner_dot[corner, t]
        pairs = corners >> 1
        for axis in range(axes - 1, -1, -1):
            for pair in range(pairs):
                for t in range(count):
                    low, high = partial[2 * pair, t], partial[2 * pair + 1, t]
                    fraction = table.fraction[axis, entry + t]
                    # With one axis nothing but this carries a coordinate's NaN on.
                    slope = fraction if fraction != fraction else high - low
                    partial[pair, t] = slope if axis == along else (one - fraction) * low + fraction * high
            pairs >>= 1
        for t in range(count):
            d_offset[along, t] = partial[0, t] * mask[t] if mask.size else partial[0, t]
