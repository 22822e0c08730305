"""Where a sliding window puts its taps, for the CPU: the positions at which `sampling.corners` samples."""

from __future__ import annotations

from numba.cpython.unsafe.tuple import tuple_setitem

from deformconv.runtime.cache import device
from deformconv.runtime.simd import Rows
from deformconv.sampling.corners import place_samples

__all__ = [
    "BEFORE", "DILATION", "INPUT", "KERNEL", "OUTPUT", "STRIDE", "place_tap", "place_tile", "place_windows", "tap_shifts",
]  # fmt: skip

# The rows of `geometry`, an int64 array of D columns.
INPUT, KERNEL, STRIDE, BEFORE, DILATION, OUTPUT = range(6)


@device
def place_tile(size, geometry, first, count, table):
    """Write the origin of each position's window into the table."""
    place_windows(size, geometry, first, count, Rows(table.rows, (1 << len(size)) * table.tile, table.tile))


@device
def place_windows(size, geometry, first, count, origins):
    """Write the origin of each position's window, position * stride - padding, into a row for each axis."""
    axes, last = len(size), len(size) - 1
    position, rest = size, first
    for axis in range(last, -1, -1):
        position = tuple_setitem(position, axis, rest % geometry[OUTPUT, axis])
        rest //= geometry[OUTPUT, axis]
    t = 0
    while t < count:  # row by row
        run = min(count - t, geometry[OUTPUT, last] - position[last])
        for axis in range(axes):
            start = position[axis] * geometry[STRIDE, axis] - geometry[BEFORE, axis]
            step = geometry[STRIDE, axis] if axis == last else 0
            fill(origins.array, origins.start + axis * origins.row + t, run, start, step)
        t += run
        position = tuple_setitem(position, last, position[last] + run)
        for axis in range(last, 0, -1):
            if position[axis] == geometry[OUTPUT, axis]:
                position = tuple_setitem(tuple_setitem(position, axis, 0), axis - 1, position[axis - 1] + 1)


@device
def fill(array, first, count, start, step):
    """Write `count` numbers, `step` apart, into a part of an array."""
    for number in range(count):
        array[first + number] = start + number * step


@device
def place_tap(size, geometry, inside, tap, count, offset, table):
    """Fill the table with one tap's samples; row `axis` of `offset` has an offset along that axis for each position."""
    place_samples(size, tap_shifts(size, geometry, tap), inside, count, offset, table)


@device
def tap_shifts(size, geometry, tap):
    """Where a tap lies within its window along each axis."""
    shifts, rest = size, tap
    for axis in range(len(size) - 1, -1, -1):
        shifts = tuple_setitem(shifts, axis, rest % geometry[KERNEL, axis] * geometry[DILATION, axis])
        rest //= geometry[KERNEL, axis]
    return shifts
