"""Copies of the weight into panels for the matrix product, and of results into the caller's arrays.

All arrays are flat. A weight is (C_out, C / groups, K), or with `last` set (C_out, K, C / groups). The caller's arrays may hold
half precision, and panels words, which are pairs of rows (`runtime.pairs`).
"""

from __future__ import annotations

import numpy as np

from deformconv.runtime.blocks import RUN, add_rows, transpose, zero
from deformconv.runtime.cache import device, in_order
from deformconv.runtime.matmul import VECTORS
from deformconv.runtime.simd import (
    VECTOR_BYTES,
    Rows,
    numbers_in,
    read,
    round_up,
    transpose_block,
    write,
    write_number,
    write_row,
)

__all__ = [
    "pack_backward",
    "pack_depthwise",
    "pack_forward",
    "sum_positions",
    "unpack_weight",
    "write_output",
]


@device
def write_output(sums, group_row, groups, group_outputs, n, first, count, output, last, positions, bias):
    """output[n, o, first + t] = sums[t, o] + bias[o], of each group without the padding to `group_row`."""
    sum_row, outputs = groups * group_row, groups * group_outputs
    if group_row == group_outputs:  # rows without padding are one group's
        groups, group_outputs = 1, outputs
    for group in range(groups):
        o, source = group * group_outputs, group * group_row
        if not last:
            into = (n * outputs + o) * positions + first
            transpose(count, group_outputs, sums, source, sum_row, output, into, positions, bias, o)
            continue
        for t in range(count):
            into = (n * positions + first + t) * outputs + o
            for i in range(group_outputs):
                total = sums[source + t * sum_row + i]
                write(output, into + i, total + read(bias, o + i) if bias.size else total)


@device
def pack_forward(item, weight, last, groups, outputs, channels, taps, packed, square, empty):
    """Copy a panel of output channels, with rows (tap, channel): packed[g, panel, tap * C + c, lane] = weight[g, o, c, tap].

    `square` is scratch of a vector's lanes squared.
    """
    lanes = VECTOR_BYTES // packed.itemsize
    panel, depth = VECTORS * lanes, taps * channels
    panels = (outputs + panel - 1) // panel
    group, first = item // panels, item % panels * panel
    width = lanes if outputs - first <= lanes else panel
    start = (group * round_up(outputs, lanes) + first) * (depth // numbers_in(packed))
    for vector in range(0, width, lanes):
        source = (group * outputs + first + vector) * depth
        into = Rows(packed, start + vector, width)
        used = min(lanes, outputs - first - vector)
        whole = depth // lanes * lanes if used == lanes else 0
        for step in range(0, whole, lanes):
            transpose_block(weight, source + step, depth, square, 0, lanes, empty, 0, False)
            for i in range(lanes):
                write_row(square, i * lanes, into, _weight_row(step + i, last, channels, taps), lanes)
        for step in range(whole, depth):
            for lane in range(used):
                square[lane] = read(weight, source + lane * depth + step)
            for lane in range(used, lanes):
                square[lane] = 0
            write_row(square, 0, into, _weight_row(step, last, channels, taps), lanes)


@device
def _weight_row(step, last, channels, taps):
    """Which row (tap, channel) a step through an output's weights is; they are (C, K), or (K, C) with channels last.

    In either order a channel's row comes before that of the next one, as `write_row` wants it.
    """
    return step if last else step % taps * channels + step // taps


@device
def pack_backward(item, weight, last, groups, outputs, channels, taps, packed, width):
    """Copy an output channel's weights: packed[tap, g, block, panel, o, lane] = weight[g, o, c, tap], in panels of inputs.

    A block has `width` channels of a group, the last one what is left. Panels of words take the output channels of a pair.
    """
    lanes, numbers = VECTOR_BYTES // packed.itemsize, numbers_in(packed)
    panel, depth = VECTORS * lanes, outputs // numbers
    size = round_up(channels, lanes) * depth
    for output in range(item * numbers, (item + 1) * numbers):
        group, o = output // outputs, output % outputs
        for block in range(0, channels, width):
            end = min(block + width, channels)
            for first in range(block, end, panel):
                row = lanes if end - first <= lanes else panel
                source = output * channels * taps + first * (1 if last else taps)
                into = Rows(packed, group * size + first * depth, row)
                _pack_output(weight, source, last, channels, taps, into, o, min(row, end - first), groups * size)


@device
def _pack_output(weight, source, last, channels, taps, into, o, used, tap_size):
    """Row o of a panel, and of that of each tap, `tap_size` further: the first channels from `source` on, and zeros."""
    tap_step, channel_step = (channels, 1) if last else (1, taps)
    for tap in range(taps):
        panel = into.start + tap * tap_size
        for lane in range(used):
            number = read(weight, source + lane * channel_step + tap * tap_step)
            write_number(Rows(into.array, panel + lane, into.row), o, number)
        row = panel + o // numbers_in(into.array) * into.row
        zero(into.array, row + used, row + into.row)


@device
def pair_positions(item, array, last, outputs, positions, words):
    """Copy a run of an image's positions in bfloat16 into words (N, C_out, pairs) of neighbours; a last one is beside a 0."""
    runs, pairs = (positions + RUN - 1) // RUN, (positions + 1) // 2
    n, first = item // runs, item % runs * RUN
    end = min(first + RUN, positions)
    image, output, position = n * outputs * positions, 1 if last else positions, outputs if last else 1
    for o in range(outputs):
        source, into = image + o * output, (n * outputs + o) * pairs
        for t in range(first, end - 1, 2):
            words[into + t // 2] = pair_of(array[source + t * position], array[source + (t + 1) * position])
        if end % 2 == 1:
            words[into + end // 2] = pair_of(array[source + (end - 1) * position], 0)


@device
def pair_of(low, high):
    """A word of two numbers of 16 bits."""
    return np.uint32(low) | np.uint32(high) << np.uint32(16)


@device
def pack_depthwise(weight, channels, taps, packed):
    """packed[tap, c] = weight[c, 0, tap]."""
    for tap in range(taps):
        for c in range(channels):
            packed[tap * channels + c] = read(weight, c * taps + tap)


@in_order
def sum_positions(o, array, last, outputs, positions, images, zero):
    """The sum over images and positions of one channel, in the dtype of `zero`.

    Sums of sums: their error grows with the square root of the positions and not with the positions.
    """
    step, total = outputs if last else 1, zero
    for n in range(images):
        start = n * outputs * positions + (o if last else o * positions)
        for first in range(0, positions, 512):
            total += _sum_run(array, start + first * step, step, min(512, positions - first), zero)
    return total


@in_order
def _sum_run(array, start, step, count, zero):
    """The sum of a run of numbers: eight sums side by side, which a vector can hold, and these two by two."""
    a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
    for eight in range(0, count - 7, 8):
        p = start + eight * step
        a += read(array, p)
        b += read(array, p + step)
        c += read(array, p + 2 * step)
        d += read(array, p + 3 * step)
        e += read(array, p + 4 * step)
        f += read(array, p + 5 * step)
        g += read(array, p + 6 * step)
        h += read(array, p + 7 * step)
    for p in range(start + count // 8 * 8 * step, start + count * step, step):
        a += read(array, p)
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@in_order
def unpack_weight(item, sums, replicas, rows, row, groups, outputs, channels, taps, d_weight):
    """d_weight[g, o, c, tap] = sum over replicas of sums[replica, tap, g, o, c], for one output channel.

    A tap and group has `rows` rows of `row` sums.
    """
    group, o = item // outputs, item % outputs
    for tap in range(taps):
        source = ((tap * groups + group) * rows + o) * row
        into = item * channels * taps + tap
        for replica in range(1, replicas):
            add_rows(sums, source, source + replica * (sums.size // replicas), channels)
        for c in range(channels):
            write(d_weight, into + c * taps, sums[source + c])
